"""The models of this package behind the Auto classes of transformers; see ``register``."""


def register() -> None:
    """Let the Auto classes of transformers give this package's models for the family's model types.

    From then on every ``phi3``, ``phimoe`` and ``phi3_v`` that this process loads through ``AutoConfig``,
    ``AutoModelForCausalLM``, ``AutoModelForImageTextToText`` (vision) and ``AutoProcessor`` is ours, without remote
    code. ``AutoProcessor`` gives text models their tokenizer. Nothing is registered by importing; calling again changes
    nothing.

    Raises:
        ImportError: where transformers is not installed (``pip install phi35[transformers]``).
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

    from phi35.interop.modeling import CLASSES
    from phi35.interop.processing import Phi3VProcessor
    from phi35.interop.tokenization import FamilyTokenizer

    for model_type, (config_class, model_class) in CLASSES.items():
        AutoConfig.register(model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        reads_images = model_type == "phi3_v"
        AutoProcessor.register(config_class, Phi3VProcessor if reads_images else FamilyTokenizer, exist_ok=True)
        if reads_images:
            AutoModelForImageTextToText.register(config_class, model_class, exist_ok=True)
