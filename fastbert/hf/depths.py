"""How deep each weight of a model lies: what freezing and rates by layer go by."""

from torch import nn

from fastbert.hf.models import Encoder


def depths(model: nn.Module) -> tuple[dict[str, int], int]:
    """The depth of each parameter: 0 of embeddings, 1 of the first layer, L + 1 of pooler and head.

    Args:
        model: accelerated, whatever is around its encoder.

    Returns:
        Depths by the parameter's name, and L.
    """
    name, encoder = next((n, m) for n, m in model.named_modules() if isinstance(m, Encoder))
    layers = list(encoder._stack().layer)
    of_parameter = {
        id(parameter): depth
        for depth, layer in enumerate(layers, 1)
        for parameter in layer.parameters()
    }
    inside = f"{name}." if name else ""
    found = {}
    for full, parameter in model.named_parameters():
        is_below = full.startswith(inside) and not full.startswith(f"{inside}pooler.")
        found[full] = of_parameter.get(id(parameter), 0 if is_below else len(layers) + 1)
    return found, len(layers)
