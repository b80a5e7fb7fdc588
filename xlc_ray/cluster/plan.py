"""What a generation will make: which sites, which text, and from that the plan of chunks that resuming relies on."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from xlc_ray import files
from xlc_ray.activations import sites as site_names
from xlc_ray.activations import store
from xlc_ray.activations.pair import check_pair
from xlc_ray.activations.text import check_documents, chunk_plan, from_pretrained, load_tokenizer
from xlc_ray.activations.windows import ChunkText
from xlc_ray.cluster.session import connect, require
from xlc_ray.cluster.tokenize import by_split, tokenized
from xlc_ray.config import Config, UserError
from xlc_ray.dictionary.build import make_wiring
from xlc_ray.progress import Progress


def site_widths(config: Config) -> dict[str, int]:
    """{site: width} of what is stored: `generate.sites`, or what the wiring reads and writes. Raises UserError."""
    load_tokenizer(config.model)  # before anything is started: a model that is not there
    check_pair(config)
    model = from_pretrained(AutoConfig, config.model, "configuration")
    base = from_pretrained(AutoConfig, config.base_model, "configuration") if config.base_model else model
    found = {False: model, True: base}
    width = {is_base: site_names.width(one) for is_base, one in found.items()}
    if config.generate.sites is None:
        wiring = make_wiring(config.dictionary.wiring, site_names.num_layers(model), width[False], width[True])
        names = [*wiring.read_sites, *wiring.written_sites]
    else:
        names = list(config.generate.sites)
    for name in names:
        layer, layers = site_names.parse(name)[1], site_names.num_layers(found[site_names.of_base(name)])
        if layer >= layers:
            raise UserError(f"generate.sites: {name}: the model has no such layer; allowed: 0 to {layers - 1}")
    return {name: width[site_names.of_base(name)] for name in sorted(set(names), key=site_names.order_key)}


def identities(config: Config, widths: dict[str, int]) -> dict[bool, dict[str, Any]]:
    """{held out?: every setting that decides what the store of that split holds}.

    A local model or text counts by its last name and its bytes, not by where it lies: a job may see a temporary copy.
    """
    origins = {"model.name": config.model.name}
    if config.base_model and any(map(site_names.of_base, widths)):
        origins["base_model.name"] = config.base_model.name
    named = {path: _last_name(name) for path, name in origins.items()} | config.text.renamed(_last_name)
    for i, part in enumerate(config.text.parts()):
        origins[f"text.mixture.{i}" if config.text.mixture else "text.dataset"] = str(part.dataset)
    content = {path: size for path, name in origins.items() if (size := _local_bytes(name)) is not None}
    changed = config.override(named)
    return {held_out: store.identity(changed, widths, held_out) | {"bytes": content} for held_out in (False, True)}


def _last_name(name: str) -> str:
    return name if _local_bytes(name) is None else Path(name).name


def _local_bytes(name: str) -> int | None:
    if any(sign in name for sign in "*?["):
        members = [Path(file) for file in glob.glob(name, recursive=True)]
    else:
        path = Path(name)
        members = sorted(path.rglob("*")) if path.is_dir() else [path]
    sizes = [member.stat().st_size for member in members if member.is_file()]
    return sum(sizes) if sizes else None


def claim(path: str, identity: dict[str, Any]) -> None:
    """Claim a path for this content. Raises UserError where it holds, or was begun with, another.

    An attempt that got no further than its text holds nothing that could be mixed up, and gives way.
    """
    name = files.join(path, "identity.json")
    if store.read_plan(path) is None and not files.listdir(files.join(path, "records")) and files.exists(name):
        if "format_version" not in files.read_mapping(name):
            raise UserError(f"{name}: is none of a store; choose another source.path")
        files.remove(name)
    store.begin(path, identity)


def make_plan(config: Config, paths: dict[bool, str]) -> None:
    """Tokenise until both splits have their tokens; write the text of every chunk, then that it is complete."""
    fraction = config.text.held_out_fraction
    if not 0 < fraction < 1:
        raise UserError(f"text.held_out_fraction: {fraction:g} leaves one split without documents; give 0 < f < 1")
    check_documents(config.text, load_tokenizer(config.model))  # errors now, not in a worker
    connect()
    require(1, 0, "tokenising")
    for path in paths.values():
        store.remove_text(path)  # of a plan that was not finished
    make = config.generate
    total = {False: make.tokens, True: make.held_out_tokens}
    rows: dict[bool, list[int]] = {False: [], True: []}
    with closing(tokenized(config)) as stream, Progress("tokenise", "chunks", None) as progress:
        plans = {
            held_out: chunk_plan(packed, total[held_out], make.chunk_tokens, config.seed)
            for held_out, packed in by_split(stream).items()
        }
        for held_out, chunk in _in_turn(plans):
            store.write_text(paths[held_out], chunk)
            rows[held_out].append(chunk.rows)
            progress.update(len(rows[False]) + len(rows[True]), sum(rows[False]) + sum(rows[True]))
    for held_out, path in paths.items():
        store.write_plan(path, rows[held_out])


def _in_turn(plans: dict[bool, Iterator[ChunkText]]) -> Iterator[tuple[bool, ChunkText]]:
    """Chunks of both splits by turns, so that neither's windows pile up while the other waits for its share."""
    for held_out in itertools.cycle(list(plans)):
        if not plans:
            return
        if held_out in plans:
            chunk = next(plans[held_out], None)
            if chunk is None:
                del plans[held_out]
            else:
                yield held_out, chunk
