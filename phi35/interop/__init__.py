"""The models of this package behind the Auto classes of transformers; see ``register``."""


def register() -> None:
    """Let ``AutoConfig`` and ``AutoModelForCausalLM`` give this package's models for the family's model types.

    From then on every ``phi3``, ``phimoe`` and ``phi3_v`` that this process loads through the Auto classes is ours,
    without remote code. Nothing is registered by importing; calling again changes nothing.

    Raises:
        ImportError: where transformers is not installed (``pip install phi35[transformers]``).
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from phi35.interop.modeling import CLASSES

    for model_type, (config_class, model_class) in CLASSES.items():
        AutoConfig.register(model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
