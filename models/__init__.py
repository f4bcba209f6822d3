"""Networks. `create_model` builds a classifier by name, `load_pretrained` fills it from any checkpoint."""

from models.factory import create_model, list_models
from models.loading import LoadReport, load_pretrained

__all__ = ["LoadReport", "create_model", "list_models", "load_pretrained"]
