"""SAEs of other libraries, from files written by hand in their layouts; every refusal by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from safedig_core.chain import Chain
from safedig_core.dictionary.dictionary import Card, Dictionary, PositionInfo, save_dictionary
from safedig_core.interop.convert import (
    export_saelens,
    import_sae,
    import_saes,
    save_imported,
    thresholded,
    unit_rows,
)
from safedig_core.interop.formats import ForeignError
from safedig_core.prompts import PromptPair
from safedig_core.recipe import Credits, Recipe
from safedig_core.sae import quality
from safedig_core.store.store import ActivationStore
from tests.tiny import TINY, WordHost, captured, random_sae

WIDTH, FEATURES, K = 16, 40, 5
SAELENS = {
    "d_in": WIDTH,
    "d_sae": FEATURES,
    "dtype": "float32",
    "device": "cpu",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {"sae_lens_version": "6.5.0", "hook_name": "blocks.3.hook_resid_post", "l0": 12.5},
    "architecture": "standard",
}
SPARSIFY = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": FEATURES}
SPARSIFY |= {"k": K, "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": WIDTH}


def numbers(*names: str) -> dict[str, Tensor]:
    """Random W_enc [d, F], W_dec [F, d], b_dec [d], else [F]."""
    g = torch.Generator().manual_seed(len(names))
    shapes = {"W_enc": (WIDTH, FEATURES), "W_dec": (FEATURES, WIDTH), "b_dec": (WIDTH,)}
    return {name: 0.4 * torch.randn(shapes.get(name, (FEATURES,)), generator=g) for name in names}


def activations(count: int = 600) -> Tensor:
    g = torch.Generator().manual_seed(5)
    return 1 + torch.randn(count, WIDTH, generator=g)


def write_saelens(folder: Path, tensors: dict[str, Tensor], **changed: Any) -> None:
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(SAELENS | changed))


def write_sparsify(folder: Path, tensors: dict[str, Tensor], **changed: Any) -> None:
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    found = {names.get(name, name): t.T if name == "W_enc" else t for name, t in tensors.items()}
    save_file({name: t.contiguous() for name, t in found.items()}, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(SPARSIFY | changed))


def write_learning(folder: Path, kind: str, tensors: dict[str, Any]) -> None:
    torch.save(tensors, folder / "ae.pt")
    config = {"trainer": {"dict_class": kind, "lr": 1e-3, "k": K}, "buffer": {"d_submodule": WIDTH}}
    (folder / "config.json").write_text(json.dumps(config))


def expected(a: Tensor, w: dict[str, Tensor], *, subtract: bool, threshold: Tensor | float = 0.0) -> Tensor:
    h = (a - w["b_dec"] * subtract) @ w["W_enc"] + w["b_enc"]
    return torch.where(h > threshold, h.relu(), 0.0) @ w["W_dec"] + w["b_dec"]


def require_close(folder: Path, a: Tensor, theirs: Tensor) -> None:
    sae, _ = import_sae(folder, WIDTH)
    assert (sae.reconstruct(a) - theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert torch.allclose(sae.decoder_weight.norm(dim=1), torch.ones(FEATURES), atol=1e-5)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saelens_standard_and_jumprelu(tmp_path: Path, subtract: bool, dtype: torch.dtype) -> None:
    w = {k: v.to(dtype) for k, v in numbers("W_enc", "b_enc", "W_dec", "b_dec", "threshold").items()}
    a, wide = activations(), {k: v.float() for k, v in w.items()}
    write_saelens(tmp_path, w, architecture="jumprelu", apply_b_dec_to_input=subtract)
    # some of these thresholds are below 0, where the ReLU decides
    require_close(tmp_path, a, expected(a, wide, subtract=subtract, threshold=wide["threshold"]))
    del w["threshold"]
    write_saelens(tmp_path, w, apply_b_dec_to_input=subtract)
    require_close(tmp_path, a, expected(a, wide, subtract=subtract))


def test_a_gate_is_a_threshold(tmp_path: Path) -> None:
    """SAELens' gated SAE and dictionary_learning's, as their papers compute them."""
    w, a = numbers("W_enc", "W_dec", "b_dec", "r_mag", "b_gate", "b_mag"), activations()
    y = (a - w["b_dec"]) @ w["W_enc"]
    z = (y + w["b_gate"] > 0) * torch.relu(y * w["r_mag"].exp() + w["b_mag"])
    theirs = z @ w["W_dec"] + w["b_dec"]
    (tmp_path / "lens").mkdir()
    write_saelens(tmp_path / "lens", w, architecture="gated")
    require_close(tmp_path / "lens", a, theirs)
    names = {"b_dec": "decoder_bias", "r_mag": "r_mag", "b_gate": "gate_bias", "b_mag": "mag_bias"}
    state = {new: w[name] for name, new in names.items()}
    state |= {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T}
    write_learning(tmp_path, "GatedAutoEncoder", state)
    require_close(tmp_path, a, theirs)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("factor", [None, 0.25])
def test_saelens_batch_top_k_checkpoint(
    tmp_path: Path, subtract: bool, rescale: bool, factor: float | None
) -> None:
    w, a = numbers("W_enc", "b_enc", "W_dec", "b_dec"), activations()
    options: dict[str, Any] = {"architecture": "batchtopk", "apply_b_dec_to_input": subtract, "k": 5.0}
    options |= {"rescale_acts_by_decoder_norm": rescale, "decoder_init_norm": 0.1}
    if factor is not None:
        options["normalize_activations"] = "expected_average_only_in"
        (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor}))
    write_saelens(tmp_path, w | {"topk_threshold": torch.tensor(0.3).double()}, **options)
    # the threshold is over h |w_j| where codes are ranked by that
    threshold = 0.3 / w["W_dec"].norm(dim=1) if rescale else 0.3
    theirs = expected(a * (factor or 1), w, subtract=subtract, threshold=threshold) / (factor or 1)
    require_close(tmp_path, a, theirs)


@pytest.mark.parametrize("kind", ["AutoEncoder", "AutoEncoderNew", "BatchTopKSAE"])
def test_dictionary_learning_linear(tmp_path: Path, kind: str) -> None:
    w, a = numbers("W_enc", "b_enc", "W_dec", "b_dec"), activations()
    bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "BatchTopKSAE": "b_dec"}[kind]
    state = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
    state |= {bias: w["b_dec"]}
    if kind == "BatchTopKSAE":
        state |= {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(0.4)}
    write_learning(tmp_path, kind, state)
    threshold = 0.4 if kind == "BatchTopKSAE" else 0.0
    require_close(tmp_path, a, expected(a, w, subtract=kind != "AutoEncoderNew", threshold=threshold))


@pytest.mark.parametrize("kind", ["JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"])
def test_dictionary_learning_plain(tmp_path: Path, kind: str) -> None:
    w, a = numbers("W_enc", "b_enc", "W_dec", "b_dec", "threshold"), activations()
    state = dict(w)
    if kind == "MatryoshkaBatchTopKSAE":
        w["threshold"] = state["threshold"] = torch.tensor(0.2)
        state |= {"k": torch.tensor(K), "group_sizes": torch.tensor([10, 30])}
    write_learning(tmp_path, kind, state)
    theirs = expected(a, w, subtract=kind != "JumpReluAutoEncoder", threshold=w["threshold"])
    require_close(tmp_path, a, theirs)


def top_k(folder: Path, library: str) -> dict[str, Tensor]:
    w = numbers("W_enc", "b_enc", "W_dec", "b_dec")
    if library == "sparsify":
        write_sparsify(folder, w)
    elif library == "saelens":
        write_saelens(folder, w, architecture="topk", k=K)
    else:
        state = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
        state |= {"b_dec": w["b_dec"], "k": torch.tensor(K), "threshold": torch.tensor(9.0)}
        write_learning(folder, "AutoEncoderTopK", state)
    return w


@pytest.mark.parametrize("library", ["sparsify", "saelens", "dictionary_learning"])
def test_top_k_needs_activations_and_says_what_its_threshold_changes(tmp_path: Path, library: str) -> None:
    w = top_k(tmp_path, library)
    with pytest.raises(ForeignError, match="keeps the 5 largest features of each token"):
        import_sae(tmp_path, WIDTH)
    tokens = activations(4000)
    sae, origin = import_sae(tmp_path, WIDTH, tokens)
    unseen = tokens[1::2]
    h = ((unseen - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    top = h.topk(K, dim=1)
    theirs = torch.zeros_like(h).scatter(1, top.indices, top.values) @ w["W_dec"] + w["b_dec"]
    total = (unseen - unseen.mean(0)).square().sum()
    figures = origin["approximation"]
    assert abs((sae.encode(tokens[::2]) > 0).sum(1).float().mean() - K) < 1e-3
    assert figures["l0"] == pytest.approx((sae.encode(unseen) > 0).sum(1).float().mean().item(), abs=0.02)
    difference = (sae.reconstruct(unseen) - theirs).square().sum() / total
    assert figures["difference"] == pytest.approx(difference.item(), rel=1e-3)
    assert figures["fvu_top_k"] == pytest.approx(((unseen - theirs).square().sum() / total).item(), rel=1e-3)


def test_nothing_changes_where_all_features_are_kept() -> None:
    """k = F with every h over 0: the threshold keeps what the k largest keep."""
    sae = random_sae(FEATURES, WIDTH)
    sae.encoder_bias.fill_(100.0)
    result, figures = thresholded(sae, FEATURES, activations())
    assert figures["difference"] == 0
    assert figures["l0"] == FEATURES
    assert figures["fvu"] == pytest.approx(quality(result, [activations()[1::2]])["fvu"])


def saved(path: Path, sae: Any) -> Dictionary:
    save_dictionary(path, Card(TINY, {"text": PositionInfo(3)}), {"text": sae})
    return Dictionary.open(path)


@given(seed=st.integers(0, 10_000), stretch=st.floats(0.01, 100), threshold=st.floats(0, 2))
@settings(max_examples=20, deadline=None)
def test_export_and_import_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, seed: int, stretch: float, threshold: float
) -> None:
    folder = tmp_path_factory.mktemp("export")
    sae = random_sae(FEATURES, TINY.text_width, seed, threshold)
    sae.scale.fill_(stretch)
    sae.decoder_weight[3] = 0  # a dead feature
    a = sae.mean + stretch * torch.randn(200, TINY.text_width, generator=torch.Generator().manual_seed(seed))
    export_saelens(saved(folder / "d.safetensors", sae), "text", folder)
    ours = sae.reconstruct(a)
    w = load_file(folder / "sae_weights.safetensors")
    cfg = json.loads((folder / "cfg.json").read_text())
    assert cfg["architecture"] == "jumprelu"
    tolerance = 2e-5 * max(1.0, ours.abs().max().item())
    h = replace(sae, threshold=torch.full_like(sae.threshold, -1e30)).encode(a)
    edge = ((h - threshold).abs() > 1e-4).all(1)  # rounding may tip the others
    assert edge.sum() > 100
    theirs = expected(a, w, subtract=cfg["apply_b_dec_to_input"], threshold=w["threshold"])
    assert (theirs - ours)[edge].abs().max() < tolerance
    back, origin = import_sae(folder, TINY.text_width)
    assert origin["architecture"] == "jumprelu"
    assert (back.reconstruct(a) - ours)[edge].abs().max() < tolerance


def test_export_of_a_position_that_is_not_there(tmp_path: Path) -> None:
    dictionary = saved(tmp_path / "d.safetensors", random_sae(FEATURES, TINY.text_width))
    with pytest.raises(ValueError, match="it has no position 'double.0.img', only text"):
        export_saelens(dictionary, "double.0.img", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unit_rows_change_no_reconstruction() -> None:
    sae = random_sae(FEATURES, WIDTH)
    a = activations()
    assert torch.allclose(unit_rows(sae).reconstruct(a), sae.reconstruct(a), atol=1e-5)


def saelens(**options: Any) -> Callable[[Path], None]:
    return lambda folder: write_saelens(folder, numbers("W_enc", "b_enc", "W_dec", "b_dec"), **options)


def with_tensor(name: str, value: Tensor | None) -> Callable[[Path], None]:
    w = {k: v for k, v in numbers("W_enc", "b_enc", "W_dec", "b_dec").items() if k != name}
    return lambda folder: write_saelens(folder, w if value is None else w | {name: value})


def learning(kind: str, **state: Any) -> Callable[[Path], None]:
    w = numbers("W_enc", "b_enc", "W_dec", "b_dec")
    found = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
    return lambda folder: write_learning(folder, kind, found | {"b_dec": w["b_dec"]} | state)


def sparsify(**options: Any) -> Callable[[Path], None]:
    return lambda folder: write_sparsify(folder, numbers("W_enc", "b_enc", "W_dec", "b_dec"), **options)


REFUSALS = [
    (lambda folder: None, "there is no SAE"),
    (saelens(architecture="temporal"), "'temporal' has no threshold form"),
    (saelens(metadata={}), "not saved by SAELens 6 or later"),
    (saelens(metadata={"sae_lens_version": "5.10.1"}), "not saved by SAELens 6 or later"),
    (saelens(normalize_activations="layer_norm"), "normalize_activations is 'layer_norm'"),
    (saelens(normalize_activations="constant_norm_rescale"), "constant_norm_rescale"),
    (saelens(normalize_activations="expected_average_only_in"), "factor that is not there"),
    (saelens(reshape_activations="hook_z"), "hook_z"),
    (saelens(future_option=3), "'future_option' is not known here"),
    (saelens(apply_b_dec_to_input="yes"), "apply_b_dec_to_input is 'yes', not a bool"),
    (saelens(d_sae=7), "its config for \\(7, 16\\)"),
    (saelens(architecture="topk", k=0), "its k is 0"),
    (saelens(architecture="topk", k=FEATURES + 1), "its k is 41"),
    (saelens(architecture="jumprelu"), "tensor 'threshold' is missing"),
    (with_tensor("extra", torch.zeros(3)), "tensor 'extra' is unexpected"),
    (with_tensor("b_enc", None), "tensor 'b_enc' is missing"),
    (with_tensor("b_enc", torch.zeros(3)), "b_enc has shape \\[3\\]"),
    (with_tensor("b_enc", torch.zeros(FEATURES, 1)), "b_enc has shape \\[40, 1\\]"),
    (with_tensor("b_enc", torch.zeros(FEATURES, dtype=torch.int64)), "b_enc' has dtype 'I64'"),
    (with_tensor("b_enc", torch.full((FEATURES,), float("nan"))), "b_enc has numbers that are not finite"),
    (
        with_tensor("b_enc", torch.full((FEATURES,), 1e200, dtype=torch.float64)),
        "b_enc has numbers beyond float32",
    ),
    (with_tensor("W_enc", torch.zeros(0, FEATURES)), "does not fit|out of reach"),
    (sparsify(transcode=True), "transcode is True"),
    (sparsify(skip_connection=True), "skip_connection is True"),
    (sparsify(activation="groupmax"), "activation is 'groupmax'"),
    (sparsify(surprise=1), "'surprise' is not known here"),
    (sparsify(k="5"), "its k is '5'"),
    (learning("IdentityDict"), "'IdentityDict' has no threshold form"),
    (learning("BatchTopKSAE", k=torch.tensor(K), threshold=torch.tensor(-1.0)), "has no threshold yet"),
    (learning("BatchTopKSAE", k=torch.tensor(K), threshold=torch.zeros(3)), "threshold has shape \\[3\\]"),
    (learning("BatchTopKSAE", k=torch.tensor(5.0), threshold=torch.tensor(0.1)), "k has dtype torch.float32"),
    (learning("BatchTopKSAE"), "tensor 'k' is missing"),
    (learning("BatchTopKSAE", k=K, threshold=torch.tensor(0.1)), "'k' is not a tensor"),
]


@pytest.mark.parametrize(("write", "complaint"), REFUSALS, ids=[str(c)[:30] for _, c in REFUSALS])
def test_refusals_name_the_folder_and_the_fault(
    tmp_path: Path, write: Callable[[Path], None], complaint: str
) -> None:
    write(tmp_path)
    with pytest.raises(ForeignError, match=complaint) as error:
        import_sae(tmp_path, WIDTH, activations())
    assert str(error.value).startswith(str(tmp_path))


def test_bad_json_is_refused(tmp_path: Path) -> None:
    saelens()(tmp_path)
    for text in ("", "[]", '{"d_in": 1, "d_in": 2}', '{"d_in": NaN}', "{" * 5000):
        (tmp_path / "cfg.json").write_text(text)
        with pytest.raises(ForeignError, match="cfg.json"):
            import_sae(tmp_path, WIDTH)


# what is made of an imported SAE


WORDS = "cat dog cow pig hen fox owl bee".split()


@pytest.fixture(scope="module")
def store(tiny_flux: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    prompts = [PromptPair("weapons", f"a {word} and a book", f"a {word} and a pistol") for word in WORDS]
    prompts += [PromptPair("safe", f"a {word}") for word in WORDS]
    return captured(WordHost(tiny_flux), tmp_path_factory.mktemp("store"), prompts, ["text", "double.1.img"])


def test_an_imported_sae_becomes_a_dictionary_like_one_of_ours(
    store: ActivationStore, tiny_flux: torch.nn.Module, tmp_path: Path
) -> None:
    """Exported and imported, SAEs are completed, or adapted later, to the same domain."""
    tune = [PromptPair("weapons", f"one {word} and a book", f"one {word} and a pistol") for word in WORDS]
    tune += [PromptPair("safe", f"two {word}") for word in WORDS]
    recipe = Recipe(most_features=5, most_telling=5)
    chain = Chain(lambda: WordHost(tiny_flux), store, tune, recipe, Credits())
    saes, folders = {}, {}
    for i, position in enumerate(store.positions):
        saes[position] = unit_rows(random_sae(FEATURES, TINY.width_of(position), i))
        folders[position] = tmp_path / position
    save_dictionary(tmp_path / "d.safetensors", Card(TINY, {p: PositionInfo(0) for p in saes}), saes)
    for position, folder in folders.items():
        export_saelens(Dictionary.open(tmp_path / "d.safetensors"), position, folder)
    imported, origins = import_saes(folders, TINY, store)
    made = []
    for name, those in (("ours", saes), ("imported", imported)):
        path = tmp_path / f"{name}.safetensors"
        chain.complete(path, "weapons", those, origins)
        made.append(Dictionary.open(path))
    save_imported(tmp_path / "bare.safetensors", imported, origins, TINY, Credits(), store)
    bare = Dictionary.open(tmp_path / "bare.safetensors")
    adapter = tmp_path / "adapter.safetensors"
    chain.adapt(adapter, bare, "weapons", "weapons")
    made.append(bare.with_adapters(adapter))

    ours = made[0]
    for other in made[1:]:
        gates = [d.card.domains["weapons"].gate for d in (ours, other)]
        assert gates[0] is not None and gates[1] is not None
        assert gates[1].false_positive_rate == gates[0].false_positive_rate
        # not their strengths: two that recover the same within rounding may be told apart by it
        assert {(a.position, a.operator) for a in other.card.plan} == {
            (a.position, a.operator) for a in ours.card.plan
        }
        for position in store.positions:
            a = store.tokens(position)
            acting, others = (d.card.domains["weapons"].features[position] for d in (ours, other))
            assert len(acting) == len(others) > 0
            moved, moved_too = (blend(d, position, a) for d in (ours, other))
            assert moved.abs().max() > 0
            assert torch.allclose(moved, moved_too, atol=1e-3 * moved.abs().max().item())


def blend(dictionary: Dictionary, position: str, a: Tensor) -> Tensor:
    """What Blend's residual form adds: s dW^T z_M."""
    found = dictionary.delta(position, "weapons")
    assert found is not None
    rows, delta = found
    sae = dictionary.sae(position).rows(rows)
    return sae.scale * (sae.encode(a) @ delta)


def test_an_sae_of_another_width_or_position_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    w = numbers("W_enc", "b_enc", "W_dec", "b_dec")
    write_saelens(tmp_path, w)
    assert import_saes({"text": tmp_path}, TINY)[0]["text"].width == TINY.text_width
    with pytest.raises(ForeignError, match="its width is 16 and its position's 32"):
        import_saes({"double.1.img": tmp_path}, TINY, store)
    with pytest.raises(ValueError, match="has no position 'double.7.img'"):
        import_saes({"double.7.img": tmp_path}, TINY)
