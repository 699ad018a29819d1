"""GGUF files: what llama.cpp will read, and, where llama-cpp-python is installed, what it then says."""

import re

import numpy as np
import pytest
import torch

from model import ModelConfig, ModernDecoderLM
from support.gguf import interleaved, spaces_before_digits, write_gguf
from tokenizer import DIGITS_PATTERN, SPECIAL_TOKENS, Tokenizer, train_bpe

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {
    "untied": dict(tie_embeddings=False, rope_theta=50_000.0, head_dim=8),
    "qwen3": dict(qk_norm=True),
    "mixtral": dict(ffn="moe", n_experts=4),
    "mistral": dict(sliding_window=24),
    "gpt2": dict(norm="layer", positions="learned", ffn="gelu", bias=True, n_kv_heads=4),
}
TEXTS = [
    "Once upon a time there was a cat.", "It's we're I'll don't they've", "12345 + 67 = 12,412.50",
    "\n\nHello\n\n\nWorld \n x", "naïve café Zürich “quoted” … 😀", "日本語 テキスト", " a  b   c",
    "tab\tand\r\nnewline  ", "a 5 6\n7", "<|user|> is text here", "ﬁ Ⅷ ½ ²³ ٣٤", "  ", "\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory) -> dict:
    """A folder for each shape, with random weights large enough that no two logits are close."""
    folder, found = tmp_path_factory.mktemp("gguf"), {}
    vocabulary = Tokenizer.load(tiny["base"])
    digits = Tokenizer(vocabulary.vocab, vocabulary.merges, SPECIAL_TOKENS, DIGITS_PATTERN)
    for name, switches in SHAPES.items():
        torch.manual_seed(1)
        shape = dict(vocab_size=448, context_length=64, n_layers=2, d_model=48, n_heads=4, n_kv_heads=2)
        model = ModernDecoderLM(ModelConfig(**shape | switches))
        for weight_name, p in model.named_parameters():
            norm = "norm" in weight_name and weight_name.endswith("weight")
            torch.nn.init.normal_(p, 1.0 if norm else 0.0, 0.2)
        found[name] = folder / name
        tokenizer = vocabulary if name == "gpt2" else digits
        model.save_pretrained(found[name])
        tokenizer.save(found[name], end_token="<|end|>" if name == "untied" else "")
    return found


def fields(file) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("name", SHAPES)
def test_a_file_holds_every_weight_once_under_llama_cpps_names(runs, name, tmp_path):
    write_gguf(runs[name], tmp_path / "x.gguf", "F32")
    model = ModernDecoderLM.from_pretrained(runs[name])
    stored = {t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    architecture = fields(tmp_path / "x.gguf")["general.architecture"]
    [arch] = [key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture]
    known = {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[arch]}
    assert {re.sub(r"blk.\d", "blk.{bid}", name.rpartition(".")[0]) for name in stored} <= known
    # The same numbers as in our model; only their order differs.
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    np.testing.assert_array_equal(stored["token_embd.weight"], weights["model.embed_tokens.weight"])
    ours, theirs = (np.sort(np.concatenate([x.ravel() for x in some.values()])) for some in (weights, stored))
    np.testing.assert_array_equal(ours, theirs)
    write_gguf(runs[name], tmp_path / "x.gguf", "F16")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
    assert all(kind == "F16" for name, kind in kinds.items() if "attn_q.weight" in name or "exps" in name)
    assert all(kind == "F32" for name, kind in kinds.items() if "norm" in name or "gate_inp" in name)


def test_settings_and_special_tokens_are_the_runs_own(runs, tmp_path):
    write_gguf(runs["untied"], tmp_path / "x.gguf")
    found, tokenizer = fields(tmp_path / "x.gguf"), Tokenizer.load(runs["untied"])
    expected = {
        "llama.rope.freq_base": 50_000,
        "llama.attention.key_length": 8,
        "llama.attention.head_count_kv": 2,
        "tokenizer.ggml.pre": "smollm",  # each digit alone
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": tokenizer.special_id("<|end|>"),
    }
    assert {key: found[key] for key in expected} == expected
    assert "<|assistant|>" in found["tokenizer.chat_template"]
    types = found["tokenizer.ggml.token_type"]
    assert types[tokenizer.eot_id] == gguf.TokenType.CONTROL and types[447] == gguf.TokenType.UNUSED
    assert len(found["tokenizer.ggml.tokens"]) == 448 == len(set(found["tokenizer.ggml.tokens"]))
    assert "stop <|end|>" in (tmp_path / "Modelfile").read_text()


def test_a_base_stops_at_the_end_of_a_document_and_begins_with_it(runs, tmp_path):
    lines = write_gguf(runs["mistral"], tmp_path / "x.gguf")
    found, eot = fields(tmp_path / "x.gguf"), Tokenizer.load(runs["mistral"]).eot_id
    assert found["tokenizer.ggml.eos_token_id"] == eot and found["tokenizer.ggml.add_bos_token"]
    assert "tokenizer.chat_template" not in found and not (tmp_path / "Modelfile").exists()
    # A sliding window becomes the context.
    assert found["llama.context_length"] == 24 and "sliding window" in "".join(lines)


def test_interleaved_rows_are_rotated_alike():
    """RoPE on halves, and llama.cpp's on neighbours, give the same dot products."""
    from model import apply_rope

    def neighbours(x, positions, theta=10000.0):
        even, odd = x[..., 0::2], x[..., 1::2]
        D = x.shape[-1]
        angles = positions[:, None] * theta ** (-torch.arange(0, D, 2) / D)
        turned = even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()
        return torch.stack(turned, -1).flatten(-2)

    torch.manual_seed(0)
    x, positions = torch.randn(5, 16), torch.arange(5)
    w_q, w_k = torch.randn(2 * 8, 16), torch.randn(2 * 8, 16)
    scores = []
    for order, rope in ((lambda w: w, apply_rope), (lambda w: interleaved(w, 2), neighbours)):
        q, k = ((x @ order(w).T).view(5, 2, 8).transpose(0, 1) for w in (w_q, w_k))
        scores.append(rope(q, positions) @ rope(k, positions).mT)
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize("switches", [
    dict(n_sinks=1), dict(ffn="gelu"), dict(moe_every=2, ffn="moe", n_experts=2),
])  # fmt: skip
def test_what_llama_cpp_does_not_compute_is_refused_by_name(tiny, tmp_path, switches):
    config = ModelConfig(vocab_size=400, n_layers=2, d_model=32, n_heads=2, **switches)
    ModernDecoderLM(config).save_pretrained(tmp_path)
    Tokenizer.load(tiny["base"]).save(tmp_path)
    with pytest.raises(ValueError, match=next(iter(switches))):
        write_gguf(tmp_path)


def test_an_adapter_and_a_foreign_tokenizer_are_refused(tiny, tmp_path):
    tokenizer = Tokenizer.load(tiny["base"])
    tokenizer.pattern = r"\p{L}+|[^\p{L}]"
    ModernDecoderLM.from_pretrained(tiny["base"]).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    with pytest.raises(ValueError, match="convert_hf_to_gguf"):
        write_gguf(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="--merge"):
        write_gguf(tmp_path)
    assert not list(tmp_path.glob("*gguf*"))


def test_tokens_of_several_spaces_are_told_about(tiny):
    vocabulary = train_bpe(["a\n\nb  \n\nx    y\n\n1"], 300, SPECIAL_TOKENS, split_digits=True)
    assert "  " in spaces_before_digits(Tokenizer(*vocabulary, SPECIAL_TOKENS, DIGITS_PATTERN))
    assert not spaces_before_digits(Tokenizer.load(tiny["base"]))


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_computes_the_same_logits_and_ids(runs, name, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    write_gguf(runs[name], tmp_path / "x.gguf", "F32")
    exact = dict(n_ctx=0, n_threads=1, verbose=False, logits_all=True, type_k=0, type_v=0)  # F32 cache
    llm = llama_cpp.Llama(str(tmp_path / "x.gguf"), **exact)
    tokenizer, model = Tokenizer.load(runs[name]), ModernDecoderLM.from_pretrained(runs[name])
    for text in TEXTS:
        ids = llm.tokenize(text.encode(), add_bos=False, special=False)
        assert ids == tokenizer.encode(text, allowed_special=()), text
    ids = [tokenizer.eot_id, *tokenizer.encode("Anna has 12 apples.")]
    llm.eval(ids)
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0].numpy()
    np.testing.assert_allclose(np.array(llm.scores[: len(ids)]), ours, atol=5e-3 if name == "gpt2" else 1e-4)
