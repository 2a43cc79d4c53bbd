"""Policies on disk: tiny ones built from scratch, and any Hugging Face folder, loaded with errors that name files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.chat import TAGS, TEMPLATE
from rollout.checkpoint import check_weights, first_line, parse_json, read_config
from rollout.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

IM_START, IM_END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
ROLES = ("system", "user", "assistant")


def train_tokenizer(corpus: Iterable[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most ``vocab`` tokens, trained on ``corpus``, with the tiny chat template.

    Digits and line ends always stand alone; words are not split at spaces, so that a wording or the JSON around an
    expression becomes one token and prompts stay short.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, IM_START, IM_END]
    smallest = 256 + len(special) + len(TAGS)
    if vocab < smallest:
        raise UserError(f"model.vocabulary: {vocab} is too small for bytes and tags; give at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[0-9]|\n"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(TAGS),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = list(corpus)
    # Every conversation holds the role names, so they count once per text.
    tokenizer.train_from_iterator([*texts, *(role for role in ROLES for _ in texts)], trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=PAD,
        extra_special_tokens=[IM_START],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE.read_text()
    return fast


def build_tiny(
    directory: str | Path,
    corpus: Iterable[str],
    *,
    hidden: int = 128,
    layers: int = 2,
    heads: int = 4,
    head_dim: int = 32,
    mlp: int = 384,
    vocab: int = 512,
    tied: bool = True,
    seed: int = 0,
    max_length: int = 4096,
) -> Path:
    """Write an untrained Qwen3 of this shape with a tokenizer trained on ``corpus``: an ordinary Hugging Face folder.

    The vocabulary is what the corpus gives, at most ``vocab``. Same arguments, same folder; the caller's random state
    is left alone. ``max_length`` in tokens.
    """
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    directory = Path(directory)
    tokenizer = train_tokenizer(corpus, vocab)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=head_dim,
        intermediate_size=mlp,
        tie_word_embeddings=tied,
        max_position_embeddings=max_length,
        dtype=torch.float32,
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, **ids)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint; a UserError says what is missing."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    check_checkpoint(path, ("tokenizer_config.json",))
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no usable tokenizer ({first_line(error)}); save one beside the model") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{path}: the tokenizer has no fast version (tokenizer.json); save one beside the model")
    if tokenizer.chat_template is None:
        raise UserError(f"{path}: the tokenizer has no chat template; use an instruction-tuned checkpoint or add one")
    return tokenizer


def load_policy(
    path: str | Path, *, dtype: str = "float32", attention: str = "sdpa", **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A causal language model and its tokenizer from a folder or a hub name.

    ``dtype`` is float32, bfloat16 or float16; ``attention`` is transformers' ``attn_implementation``; the rest goes to
    ``from_pretrained``. A missing or corrupt file is a UserError that names it.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    check_checkpoint(path, ("config.json",))
    tokenizer = load_tokenizer(path)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path}: cannot load the model: {first_line(error)}") from error
    return model, tokenizer


def check_checkpoint(path: str | Path, names: tuple[str, ...]) -> None:
    """Refuse a folder that lacks one of ``names`` or holds damaged JSON or safetensors. Hub names pass unseen."""
    folder = Path(path)
    if not folder.exists():
        if folder.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1:
            raise UserError(f"{path}: no such checkpoint; give a folder that holds config.json, or a hub name")
        return
    read_config(folder)
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: not a whole checkpoint; copy it again or give another folder")
    for file in folder.glob("*.json"):
        parse_json(file)
    check_weights(folder)
