"""Libraries that only fine-tuning uses, asked for when they are used."""

from importlib import import_module
from typing import Any

from fastbert.errors import UserError

_INSTALLED_AS = {"sklearn": "scikit-learn", "prometheus_client": "prometheus-client"}
_EXTRA = {
    "wandb": "track",
    **dict.fromkeys(("fastapi", "uvicorn", "httptools", "prometheus_client", "orjson"), "serve"),
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "export"),
}


def needs(module: str) -> Any:
    """Imports a module of the extra `finetune`, or of another that `_EXTRA` names.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        name = _INSTALLED_AS.get(package, package)
        extra = _EXTRA.get(package, "finetune")
        raise UserError(
            f'{name} is not installed: pip install "fastbert-engine[{extra}]"'
        ) from None
