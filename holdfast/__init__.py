"""Fine-tune pre-trained transformers without overfitting and without forgetting."""

__version__ = "0.1.0"
