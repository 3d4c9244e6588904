"""The order of steps from captured activations to a dictionary, and what they need.

The store's pairs train the SAEs (three in four; quality is measured on the rest), the paired maps and the
gate's read-outs. Strengths are tuned, and the gate is calibrated, on prompts and noise of their own.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import __version__
from .dictionary.dictionary import (
    Action,
    Adapters,
    Card,
    Dictionary,
    DictionaryError,
    Domain,
    Gate,
    PositionInfo,
    Witness,
    read_card,
    save_adapter,
    save_dictionary,
)
from .distributed import ALONE, Group
from .features import SELECT_EVERY, read_out, split
from .files import clear_parts, digest, need, replacing
from .hosts.host import Host
from .hosts.taps import ReplaceTap
from .positions import Architecture
from .progress import Progress, nothing
from .prompts import SAFE, PromptPair, fingerprint
from .reading import POSITIONS as READ_AT
from .reading import Reading, read
from .recipe import Credits, Recipe
from .routing import Scores
from .sae import SAE, quality
from .seeds import of_recovery
from .steering.calibration import variant_of
from .steering.gate import calibrate
from .store.store import BUFFER, ActivationStore
from .training import Curve, read_curve, train_sae
from .transfer import fit_adapter
from .tuning import Tuned, tune

_OTHER_NAME = "choose another name, or have it overwritten (--overwrite)"
LEAST = SELECT_EVERY + 1  # lines of a domain: with fewer, quality would be measured on a single one


@dataclass(frozen=True)
class Needs:
    """What a training takes at most, in bytes."""

    disk: int  # its checkpoints, and twice the file
    memory: int  # weights, gradients, Adam's two moments, and the tokens that are shuffled
    device: int  # of the device that trains, where that has memory of its own


@dataclass(frozen=True)
class Chain:
    """Makes dictionaries and adapters of one store.

    Each way to one (`train`, `complete`, `adapt`) first checks all that can be checked, and only then loads
    the model. What it writes stands at its path only when it is whole, gate included. Where the path has the
    result of the same settings already, it is left as it is; where it has anything else, that is refused,
    unless it may be overwritten.

    Args:
        host: hands over the model that the store was captured from, and may load it first.
        calibration: prompts for strengths and gate, none of them captured: of the domain, and purely safe
            ones.
        texts: prompts that only the text encoder reads (reading.py): safe ones, many and varied, and pairs.
            Those that are among `calibration` too are left out.
        processes: train together; the first does all the rest, while the others return.
    """

    host: Callable[[], Host]
    store: ActivationStore
    calibration: Sequence[PromptPair]
    recipe: Recipe
    credits: Credits
    progress: Progress = nothing
    processes: Group = ALONE
    texts: Sequence[PromptPair] = ()

    def require(self, path: Path, domain: str, positions: Collection[str] = (), source: str = "") -> None:
        """Checks what everything that is made for `domain` needs; `source` is what an adapter replays.

        Raises ValueError where the store or the calibration prompts lack lines or share some, where a
        position was not captured, and where `path` can't be written.
        """
        require_name(path, overwrite=True)  # what is there may be the result of these very settings
        found = Counter(pair.domain for pair in self.store.prompts)
        need(domain != SAFE, "'safe' is no risk: name the domain of the pairs")
        for name in dict.fromkeys((domain, source or domain, SAFE)):
            what = "purely safe prompts" if name == SAFE else "pairs"
            there = ", ".join(f"{count} of {other}" for other, count in found.items())
            enough = found[name] >= LEAST
            need(
                enough,
                f"Of '{name:.64}' at least {LEAST} {what} must have been captured. There are: {there}.",
            )
        for position in positions:
            there = ", ".join(self.store.positions)
            need(position in self.store.positions, f"{position:.64} was not captured, only {there}.")
        for name in (domain, SAFE):
            some = any(pair.domain == name for pair in self.calibration)
            need(some, f"The calibration prompts have none of '{name}': the gate needs some.")
        captured = {text for pair in self.store.prompts for text in pair.texts if text}  # "" may recur
        again = sum(not captured.isdisjoint(pair.texts) for pair in self.calibration)
        need(
            not again,
            f"{again} of the {len(self.calibration)} calibration prompts were captured too: a gate that is "
            "calibrated on what was trained on opens too late. Take a set of its own.",
        )

    def needs(self, positions: Collection[str]) -> Needs:
        """What `train` takes for these positions, which are trained one after the other."""
        return needs_of(self.recipe, self.store.architecture, positions)

    def identity(self, domain: str, *what: object) -> str:
        """Stands for all that a file for `domain` depends on: 64 hex digits."""
        return digest(
            self.store.settings.to_json(),
            fingerprint(self.calibration),
            asdict(self.recipe),
            asdict(self.credits),
            fingerprint(self.texts),
            __version__,
            domain,
            what,
        )

    def train(
        self, path: Path, source: str, positions: Mapping[str, Scores], work: Path, overwrite: bool = False
    ) -> dict[str, Curve]:
        """A dictionary for `source`, with an SAE at each of `positions`. Returns their training curves.

        Args:
            positions: each with the routing scores of its operators, none where it was chosen by hand.
            work: the folder for checkpoints, from which a killed run goes on.
        """
        self.require(path, source, positions)
        identity = self.identity(source, list(positions))
        if self._is_made(path, identity, overwrite):
            checkpoints = {position: self._checkpoint(work, source, position) for position in positions}
            return {name: read_curve(file) for name, file in checkpoints.items() if file.exists()}
        first = self.processes.rank == 0
        if first:
            work.mkdir(parents=True, exist_ok=True)
            _require_disk(self.needs(positions).disk, work)
            self._require_model()
        saes: dict[str, SAE] = {}
        curves: dict[str, Curve] = {}
        for position in positions:
            saes[position], curves[position] = self.sae(position, source, work)
        if first:
            s = self.recipe.train
            seen = {"tokens_seen": s.steps * s.batch, "made_from": identity, "source": source}
            self._complete(path, saes, positions, asdict(self.recipe) | seen, overwrite)
        return curves

    def complete(
        self,
        path: Path,
        source: str,
        saes: Mapping[str, SAE],
        origins: Mapping[str, Any],
        overwrite: bool = False,
    ) -> None:
        """A dictionary for `source` from SAEs that were trained elsewhere, as `origins` say, by position."""
        self.require(path, source, saes)
        identity = self.identity(source, origins)
        if self._is_made(path, identity, overwrite):
            return
        self._require_model()
        training = asdict(self.recipe) | {"imported": dict(origins), "made_from": identity, "source": source}
        del training["train"]  # what trained them is not known
        self._complete(path, saes, {}, training, overwrite)

    def adapt(
        self, path: Path, dictionary: Dictionary, domain: str, source: str, overwrite: bool = False
    ) -> None:
        """An adapter of `dictionary` for `domain`, with replay of `source`: the encoder stays as it is, and
        only the decoder's rows of the domain's features move."""
        dictionary.check_fits(self.store.architecture)
        card = dictionary.card
        need(domain not in card.domains, f"{dictionary.path.name} already has domain '{domain}'")
        self.require(path, domain, card.positions, source)
        identity = self.identity(domain, dictionary.sha256, source)
        if self._is_made(path, identity, overwrite):
            return
        self._require_model()
        found, told, adapters = Domain({}), dict[str, Witness](), Adapters()
        for done, position in enumerate(card.positions):
            self.progress(f"adapt to {domain}", done, len(card.positions))
            sae = dictionary.sae(position)
            rows, delta = self.adapter(position, sae, domain, source)
            found.features[position], adapters[position, domain] = rows.tolist(), (rows, delta)
            told[position] = self._witness(position, sae, domain)
        found.gate = _uncalibrated(told)
        scores: dict[str, Scores] = {}
        for action in card.plan:
            scores.setdefault(action.position, {})[action.operator] = action.score
        pairs = len(self.store.indices(domain))
        training = asdict(self.recipe) | {"source": source, "pairs": pairs, "made_from": identity}
        made = replace(self._card(domain, found, scores, training), base_sha256=dictionary.sha256)
        save = partial(save_adapter, card=made, adapters=adapters)
        self._write(path, made, save, dictionary.with_adapters, overwrite)

    def _checkpoint(self, work: Path, source: str, position: str) -> Path:
        """Its folder stands for all that an SAE depends on."""
        what = (source, asdict(self.recipe.train), fingerprint(self._texts), __version__)
        name = digest(self.store.settings.to_json(), *what)[:16]
        return work / name / f"{position}.ckpt.safetensors"

    def sae(self, position: str, source: str, work: Path) -> tuple[SAE, Curve]:
        """Trained on the source's pairs and safe prompts alone: the encoder belongs to the source domain. At
        `text` and `pooled`, half of each batch is of `texts`. It goes on from a checkpoint in `work`."""
        checkpoint = self._checkpoint(work, source, position)
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        s, store = self.recipe.train, self.store
        pairs = [pair for name in (source, SAFE) for pair in split(store.indices(name))[0]]
        reading = self._reading_at(position)
        tokens = None if reading is None else torch.cat([*reading.safe, *reading.unsafe_of(source)])

        def batches(epoch: int) -> Iterator[Tensor]:
            captured = store.batches(position, s.batch, s.seed + epoch, pairs=pairs)
            if tokens is None:
                yield from captured
                return
            generator = torch.Generator().manual_seed(s.seed + epoch)
            for batch in captured:
                half = len(batch) // 2
                drawn = torch.randint(len(tokens), (len(batch) - half,), generator=generator)
                yield torch.cat([batch[:half], tokens[drawn].float()])

        def report(step: int, figures: dict[str, float]) -> None:
            what = f"train {position}  fvu {figures['fvu']:.3f}  dead {figures['dead']:.2f}"
            self.progress(what, step, s.steps)

        return train_sae(batches, s, checkpoint=checkpoint, progress=report, group=self.processes)

    def _complete(
        self,
        path: Path,
        saes: Mapping[str, SAE],
        scores: Mapping[str, Scores],
        training: dict[str, Any],
        overwrite: bool,
    ) -> None:
        """From SAEs to a dictionary: chooses the source domain's features, adapts the decoder to its safe
        rewrites, measures, tunes, calibrates and writes."""
        source = training["source"]
        store, held_out = self.store, split(self.store.indices(source))[1]
        ordered, infos = dict[str, SAE](), dict[str, PositionInfo]()
        domain, told, adapters = Domain({}), dict[str, Witness](), Adapters()
        for done, (position, sae) in enumerate(saes.items()):
            self.progress("choose features and measure", done, len(saes))
            rows, delta = self.adapter(position, sae, source, source)
            witness = self._witness(position, sae, source)
            needed = sorted({*rows.tolist(), *witness.features})  # these come first
            place = {feature: i for i, feature in enumerate(needed)}
            sae = sae.rows(torch.tensor(needed + sorted(set(range(sae.features)) - set(needed))))
            measured = quality(sae, (store.tokens(position, [pair]) for pair in held_out))
            measured["loss_recovered"] = loss_recovered(self.model, store, position, sae, held_out)
            ordered[position], infos[position] = sae, PositionInfo(len(needed), measured)
            domain.features[position] = [place[f] for f in rows.tolist()]
            moved = torch.tensor(domain.features[position], dtype=torch.int64)  # there may be none
            adapters[position, source] = moved, delta
            told[position] = replace(witness, features=[place[f] for f in witness.features])
        domain.gate = _uncalibrated(told)
        card = replace(self._card(source, domain, scores, training), positions=infos)
        save = partial(save_dictionary, card=card, saes=ordered, adapters=adapters)
        self._write(path, card, save, Dictionary.open, overwrite)

    def adapter(self, position: str, sae: SAE, domain: str, source: str) -> tuple[Tensor, Tensor]:
        """The features that act for `domain`, and the change of their decoder rows (fit_adapter)."""
        reading = self._reading_at(position)
        return fit_adapter(self.store, position, sae, domain, source, self.recipe, reading)

    def _witness(self, position: str, sae: SAE, domain: str) -> Witness:
        """What tells `domain` at a position, before it is calibrated."""
        reading = self._reading_at(position)
        features, weights = read_out(self.store, position, sae, domain, self.recipe, reading)
        return Witness(features, weights, 0.0, 1.0, self.recipe.window_at(position))

    def _reading_at(self, position: str) -> Reading | None:
        """None where a text encoder's pass says nothing: then it isn't run for that."""
        return self._reading.get(position) if position in READ_AT else None

    @cached_property
    def _reading(self) -> dict[str, Reading]:
        """By position, what the text encoder makes of `texts`; nothing where there are none."""
        return read(self.model, self._texts, partial(self.progress, "read texts")) if self._texts else {}

    @cached_property
    def _texts(self) -> list[PromptPair]:
        """`texts`, but for those that strengths and gate are set on."""
        held = {text for pair in self.calibration for text in pair.texts}
        return [pair for pair in self.texts if held.isdisjoint(pair.texts)]

    def _card(
        self, name: str, domain: Domain, scores: Mapping[str, Scores], training: dict[str, Any]
    ) -> Card:
        return Card(
            self.store.architecture,
            domains={name: domain},
            plan=candidates(domain, name, scores, self.recipe),
            training=training | {"checkpoint": self.model.checkpoint},
            licence=self.credits.licence,
            creator=self.credits.creator,
            title=self.credits.title or f"{name} for {self.store.settings.model}",
            source_sha256=self.store.settings.prompts_sha256,
        )

    def _write(
        self,
        path: Path,
        card: Card,
        save: Callable[[Path], None],
        opened: Callable[[Path], Dictionary],
        overwrite: bool,
    ) -> None:
        """Saves the card's file, tunes the plan and calibrates the gate with it, and saves it again: only
        that is ever at `path`. Without a gate a dictionary acts on every picture.

        Of several processes that write there, the first one's file stays, unless it may be overwritten.
        """
        (name,), identity = card.domains, card.training["made_from"]
        if _has(path, identity, overwrite):
            return
        mine = [pair for pair in self.calibration if pair.domain == name]
        clear_parts(path.parent, path.name)
        with replacing(path) as part:
            save(part)
            tuned = tune(self.model, opened(part), card.plan, mine, partial(self.progress, f"tune {name}"))
            card.plan[:] = tuned.plan
            card.training.update(tuned.record())
            rate = self.recipe.false_positive_rate
            report = partial(self.progress, f"calibrate {name}")
            card.domains[name].gate = calibrate(
                self.model, opened(part), name, self.calibration, rate, report
            )
            card.training["calibrated_on"] = variant_of(self.model)
            save(part)
            if not overwrite:
                with suppress(OSError):  # there is a file by now, or the disk has no links
                    os.link(part, path)
                _has(path, identity, overwrite)

    def _is_made(self, path: Path, identity: str, overwrite: bool) -> bool:
        """Whether `path` has the result already; the first process looks, for all. Raises ValueError where
        it has something else that must stay."""
        same = self.processes.rank == 0 and _has(path, identity, overwrite)
        made = self.processes.sum_(torch.tensor([float(same)])).item() > 0
        if made:
            self.progress(f"{path.name} is there already", 1, 1)
        return made

    def _require_model(self) -> None:
        theirs, ours = self.store.architecture, self.model.architecture
        need(
            theirs.fits(ours),
            f"{self.store.folder} was captured from a {theirs.describe()}, and this model is a "
            f"{ours.describe()}: take the one that it was captured from",
        )

    @cached_property
    def model(self) -> Host:
        """Loaded once, by whoever asks first."""
        return self.host()


def _has(path: Path, identity: str, overwrite: bool) -> bool:
    """Whether `path` has the result of these settings. Raises ValueError where it has anything else that
    must stay."""
    same = False
    if os.path.lexists(path):
        with suppress(DictionaryError):
            same = read_card(path).training.get("made_from") == identity
        need(same or overwrite, f"{path} is there already, made with other settings: {_OTHER_NAME}")
    return same


def needs_of(recipe: Recipe, architecture: Architecture, positions: Collection[str]) -> Needs:
    """What training at these positions takes, one after the other."""
    s = recipe.train
    widths = [architecture.width_of(position) for position in positions]
    weights, widest = [8 * s.features * width for width in widths], max(widths, default=0)
    state = 4 * max(weights, default=0)
    batch = 4 * s.batch * (6 * s.features + 6 * widest)  # codes, reconstructions and their gradients
    return Needs((3 + 2) * sum(weights), state + batch + 3 * 2 * BUFFER * widest, state + batch)


def require_name(path: Path, overwrite: bool) -> None:
    """Makes the folder of a dictionary that is to be written. Raises ValueError where it can't be."""
    need(path.suffix == ".safetensors", f"{path}: the name of a dictionary ends in .safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    need(os.access(path.parent, os.W_OK), f"{path.parent} can't be written to: choose another folder")
    need(overwrite or not os.path.lexists(path), f"{path} is there already: {_OTHER_NAME}")


def _require_disk(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    need(
        needed <= free,
        f"{folder}: checkpoints and dictionary take {needed / 1e9:.2f} GB and the disk has "
        f"{free / 1e9:.2f} GB. Make room, or choose fewer positions or features.",
    )


def _uncalibrated(told: dict[str, Witness]) -> Gate:
    return Gate(told, 0.0, 1.0, 0)


def candidates(domain: Domain, name: str, scores: Mapping[str, Scores], recipe: Recipe) -> list[Action]:
    """What tuning chooses from: both operators wherever a feature acts, with the largest strength allowed."""
    strengths = {"blend": recipe.blend, "repel": recipe.repel}
    return [
        Action(
            position,
            operator,
            "residual",
            strength,
            recipe.window_at(position),
            dict(scores.get(position, {}).get(operator, {})),
            name,
        )
        for operator, strength in strengths.items()
        for position, features in domain.features.items()
        if features and strength > 0
    ]


def tune_again(
    host: Host,
    dictionary: Dictionary,
    domain: str,
    pairs: Sequence[PromptPair],
    recipe: Recipe,
    progress: Progress = nothing,
) -> tuple[Card, Tuned]:
    """The card of the file that has `domain`, the dictionary's or an adapter's, with its plan tuned anew on
    those of `pairs` that are of the domain; its gate stays. Raises ValueError as `tune` does."""
    card = read_card(dictionary.adapter_paths.get(domain, dictionary.path))
    scores: dict[str, Scores] = {}
    for action in card.plan:
        scores.setdefault(action.position, {})[action.operator] = action.score
    choices = candidates(card.domains[domain], domain, scores, recipe)
    mine = [pair for pair in pairs if pair.domain == domain]
    tuned = tune(host, dictionary, choices, mine, partial(progress, f"tune {domain}"))
    others = [action for action in card.plan if action.domain not in ("", domain)]
    card.training.update(tuned.record())
    return replace(card, plan=[*others, *tuned.plan]), tuned


def loss_recovered(
    host: Host, store: ActivationStore, position: str, sae: SAE, indices: Sequence[int]
) -> float:
    """(L_mean - L_sae) / (L_mean - L): how much of the model's denoising loss survives where the
    position's activation is replaced by its reconstruction, against its mean; on captured latents."""
    latents = store.latents(indices).transpose(0, 1).flatten(0, 1)  # all unsafe, then all safe
    prompts = [store.prompts[i].unsafe or "" for i in indices] + [store.prompts[i].safe for i in indices]
    seeds = [of_recovery(i) for i in range(len(prompts))]
    average = torch.stack([store.tokens(position, [pair]).mean(0) for pair in indices]).mean(0)
    sae, average = sae.to(host.device), average.to(host.device)

    def loss(change: Callable[[Tensor], Tensor]) -> float:
        tap = ReplaceTap([position], lambda _, a: change(a))
        return sum(host.denoising_loss(prompts, latents, seeds, sigma, tap) for sigma in (0.9, 0.6, 0.3))

    plain, mean = loss(lambda a: a), loss(lambda a: average.expand_as(a))
    return (mean - loss(sae.reconstruct)) / (mean - plain)
