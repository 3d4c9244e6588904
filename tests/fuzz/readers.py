"""What is fuzzed: for every reader of strangers' files, how a valid file is made and how it is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from safedig_core.dictionary.card import card_text
from safedig_core.dictionary.conflicts import conflicts
from safedig_core.dictionary.dictionary import (
    Action,
    Card,
    Dictionary,
    DictionaryError,
    Domain,
    Gate,
    Witness,
    check,
    save_adapter,
)
from safedig_core.evaluation import FormRow, ResultsError, Row, Safety, read_safety
from safedig_core.hub.index import (
    Entry,
    IndexFileError,
    Location,
    Reference,
    index_text,
    read_index,
)
from safedig_core.interop.formats import ForeignError, read_foreign
from safedig_core.positions import Architecture
from safedig_core.prompts import PromptError, PromptPair, read_prompts, write_prompts
from safedig_core.steering.calibration import CalibrationError, read_calibration
from safedig_core.steering.steering import Steering
from safedig_core.store.store import ActivationStore, ActivationWriter, StoreError, StoreSettings
from tests.tiny import write_dictionary

CALIBRATED = "d.0123456789ab.calibration.json"
SMALL = Architecture("flux", (1, 1), 4, 4)
PLAN = [Action("text", "repel", "residual", 0.5, (1.0, 0.5)), Action("single.0.img", "blend", "paper", 1.0)]
PAIRS = [
    PromptPair("weapons", "a cat and a book", "a cat and a pistol", ("cat",)),
    PromptPair("safe", 'a "tea cup", 茶'),
    PromptPair("weapons", "a dog", "a dog and a knife"),
]


@dataclass(frozen=True)
class Reader:
    """`make` writes valid files into a folder, of which `victims` are damaged and `read` by turns."""

    make: Callable[[Path], None]
    victims: tuple[str, ...]
    read: Callable[[Path], object]
    error: type[ValueError]  # the one that may come out
    seal: Callable[[Path], None] = lambda folder: None  # checksums that a stranger would bring up to date
    blames_folder: bool = False  # its errors name the folder, not the file


def make_dictionary(folder: Path) -> None:
    options = {"architecture": SMALL, "domains": ("weapons", "shock"), "features": 5, "harmful": 3}
    write_dictionary(folder / "d.safetensors", PLAN, **options)


def make_adapter(folder: Path) -> None:
    make_dictionary(folder)
    base = Dictionary.open(folder / "d.safetensors")
    told = Witness([0, 4], [1.0, -0.5], 0.25, 2.0, (1.0, 0.5))
    found = Domain({"text": [1, 4]}, Gate({"text": told}, 1.0, 0.01, 100, {"name": (1, 60)}))
    card = Card(SMALL, domains={"substances": found}, base_sha256=base.sha256, title="an adapter")
    card.plan.append(Action("text", "blend", "residual", 1.0, domain="substances"))
    rows = {("text", "substances"): (torch.tensor([1, 4]), torch.ones(2, 4))}
    save_adapter(folder / "a.safetensors", card, rows)


def use(dictionary: Dictionary) -> None:
    """Everything that the nodes and the command line do with one."""
    card_text(dictionary.card)
    conflicts(dictionary)
    json.dumps(dictionary.card.to_json(), allow_nan=False)
    dictionary.with_domains({})
    for position in dictionary.card.positions:
        dictionary.sae(position)
        dictionary.needed(position, list(dictionary.card.domains))
        for domain in dictionary.card.domains:
            dictionary.delta(position, domain)
    plan = [a for a in dictionary.card.plan if a.form == "paper" or a.operator == "repel"]
    run = Steering(dictionary, plan).run()
    run.begin(1, 1, torch.device("cpu"))
    run.step(0, 1.0, slice(0, 1))
    for position in run.positions:
        run(position, torch.zeros(1, 2, dictionary.card.architecture.width_of(position)))


def read_dictionary(folder: Path) -> None:
    use(Dictionary.open(folder / "d.safetensors"))
    check(folder / "d.safetensors")


def read_adapter(folder: Path) -> None:
    use(Dictionary.open(folder / "d.safetensors").with_adapters(folder / "a.safetensors"))
    check(folder / "a.safetensors")


def make_prompts(folder: Path) -> None:
    write_prompts(folder / "p.jsonl", PAIRS)
    rows = (
        'domain,unsafe,safe,keep\nweapons,a cat and a pistol,a cat and a book,cat\nsafe,,"a ""tea"", cup",\n'
    )
    (folder / "p.csv").write_text(rows, encoding="utf-8")


def read_both(folder: Path) -> None:
    for name in ("p.jsonl", "p.csv"):
        for pair in read_prompts(folder / name):
            replace(pair)


def make_store(folder: Path) -> None:
    positions = ("text", "single.0.img")
    settings = StoreSettings(
        SMALL,
        positions,
        "test",
        tuple(PAIRS),
        (0, 3),
        tokens_per_image=2,
        sampler={"name": "euler", "cfg": 3.5},
    )
    writer = ActivationWriter.open(folder, settings)
    for group, pairs in enumerate(writer.groups()):
        shape = len(pairs), settings.sides(pairs[0])
        shard = {"latents": torch.ones(*shape, 3)}
        for position in positions:
            shard[position] = torch.ones(*shape, 2, 2, 4, dtype=torch.bfloat16)
            shard[f"{position}/tokens"] = torch.tensor([[1, 5]] * len(pairs), dtype=torch.int32)
        writer.write(group, shard)


def seal_store(folder: Path) -> None:
    for path in folder.glob("shard-*.safetensors"):
        entry = json.loads(path.with_suffix(".json").read_text())
        raw = path.read_bytes()
        entry |= {"sha256": hashlib.sha256(raw).hexdigest(), "bytes": len(raw)}
        path.with_suffix(".json").write_text(json.dumps(entry))


def read_store(folder: Path) -> None:
    store = ActivationStore(folder, partial=True)
    for pair in store.indices():
        store.latents([pair])
        for position in store.positions:
            store.images(position, [pair])
    if store.indices():
        for position in store.positions:
            list(store.batches(position, 3, 0))
    ActivationStore(folder).verify()


def make_index(folder: Path) -> None:
    where = Location("some.one/tiny", "0123456789" * 4, "files/tiny.safetensors")
    entry = Entry(
        "tiny",
        "a title",
        "flux",
        ["text", "double.1.img"],
        ["weapons"],
        1000,
        "ab" * 32,
        {"data": "CC0-1.0", "weights": "Apache-2.0"},
        hub=where,
        safety=Safety("pocket-flux", 0, measured_rows()),
    )
    adapter = replace(entry, id="tiny-shock", base="tiny", safety=None)
    (folder / "index.json").write_text(index_text([entry, adapter]))


def read_entries(folder: Path) -> None:
    for entry in read_index(folder / "index.json"):
        assert entry.reference is None or Reference.parse(str(entry.reference)) == entry.reference


def measured_rows() -> list[Row]:
    share: dict[str, float | None] = {"weapons": 0.25, "overall": 0.25}
    recovery, interval = {"weapons": -0.5, "overall": None}, [0.1, 0.5]
    forms = {
        "safe/single": FormRow(4, None, [0.0, 1.0], None, 1.0, 1.0),
        "weapons/known": FormRow(4, 0.25, interval, 1.0, None, None),
    }
    return [
        Row(name, 8, share, {"weapons": interval}, share, recovery, 1.0, None, 1.0, forms, 0.0, 0.0, 1.0)
        for name in ("none", "safedig-residual")
    ]


def make_results(folder: Path) -> None:
    rows = [asdict(row) for row in measured_rows()]
    images = [{"row": "none", "prompt": 0, "seed": 0, "seen": ["cat"], "identical": True, "gate": {}}]
    results = {"format": 2, "model": "pocket-flux", "seed": 0, "rows": rows, "images": images}
    (folder / "results.json").write_text(json.dumps(results))


def read_results(folder: Path) -> None:
    str(read_safety(folder / "results.json").headline)


def make_calibration(folder: Path) -> None:
    threshold = {"sha256": "ab" * 32, "threshold": 4.5, "forms": {"single": [1, 20], "other": [0, 4]}}
    variant = {"model": "flux 0123456789abcdef", "steps": 20, "cfg": 1.0, "sigmas": "1 0.5 0"}
    found = {"format": 1, "variant": variant, "domains": {"weapons": threshold}, "prompts_sha256": "cd" * 32}
    (folder / CALIBRATED).write_text(json.dumps(found))


def make_learning(folder: Path) -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "encoder.weight": torch.randn(6, 4, generator=g),
        "encoder.bias": torch.zeros(6),
        "decoder.weight": torch.randn(4, 6, generator=g),
        "b_dec": torch.zeros(4),
        "k": torch.tensor(2),
        "threshold": torch.tensor(0.5),
    }
    torch.save(tensors, folder / "ae.pt")
    config = {"trainer": {"dict_class": "BatchTopKSAE", "k": 2}, "buffer": {"d_submodule": 4}}
    (folder / "config.json").write_text(json.dumps(config))


def make_saelens(folder: Path) -> None:
    tensors = {"W_enc": torch.ones(4, 6), "b_enc": torch.zeros(6), "W_dec": torch.ones(6, 4)}
    tensors |= {"b_dec": torch.zeros(4), "threshold": torch.ones(6)}
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {"architecture": "jumprelu", "d_in": 4, "d_sae": 6, "dtype": "float32", "k": 2}
    config |= {"normalize_activations": "none", "metadata": {"sae_lens_version": "6.5.0", "l0": 2.5}}
    (folder / "cfg.json").write_text(json.dumps(config))


READERS = {
    "dictionary": Reader(make_dictionary, ("d.safetensors",), read_dictionary, DictionaryError),
    "adapter": Reader(make_adapter, ("a.safetensors",), read_adapter, DictionaryError),
    "dictionary_learning": Reader(
        make_learning, ("ae.pt", "config.json"), read_foreign, ForeignError, blames_folder=True
    ),
    "saelens": Reader(
        make_saelens, ("sae_weights.safetensors", "cfg.json"), read_foreign, ForeignError, blames_folder=True
    ),
    "index": Reader(make_index, ("index.json",), read_entries, IndexFileError),
    "calibration": Reader(
        make_calibration,
        (CALIBRATED,),
        lambda folder: str(read_calibration(folder / CALIBRATED)),
        CalibrationError,
    ),
    "results": Reader(make_results, ("results.json",), read_results, ResultsError),
    "prompts": Reader(make_prompts, ("p.jsonl", "p.csv"), read_both, PromptError),
    "store": Reader(
        make_store,
        ("store.json", "shard-00000.safetensors", "shard-00000.json", "shard-00001.safetensors"),
        read_store,
        StoreError,
        seal_store,
    ),
}
