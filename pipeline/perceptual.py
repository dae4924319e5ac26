"""Weights of the perceptual networks: read, checked against the published ones, recorded; fetched by hand, once.

    jobs/fetch_weights.py, on a machine with internet -> vgg16.safetensors -> --perceptual-weights vgg16.safetensors

A file holds ``features.N.weight`` and ``.bias`` of a trunk, ``heads.N.weight`` of LPIPS, or both; what belongs together
may come in two files. Which network it is follows from the shapes. What ``fetch_weights`` writes also says so in its
metadata, with the checksums of its tensors, and files of a known name must be what that name stands for.
"""

import functools
import hashlib
import importlib.util
import io
import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from objdyn.layers.perceptual import Network, Trunk, load_trunk
from objdyn.losses import vgg_distance
from objdyn.metrics.perceptual import CHANNELS, check_heads
from pipeline import store
from pipeline.config import TrainRun

if TYPE_CHECKING:
    from pipeline.config import FetchWeightsRun

FLAG = "--perceptual-weights"
METADATA = "objdyn"
"""Key of a file's metadata under which ``fetch_weights`` says in JSON what it wrote."""


class Source(NamedTuple):
    """Where an official file is, and how it and what is taken from it are known."""

    url: str
    file_sha256: str
    tensors_sha256: str
    """``digest`` of the tensors under the names that they have here."""


class Sources(NamedTuple):
    """The two parts of a network."""

    trunk: Source
    heads: Source


_TORCHVISION = "https://download.pytorch.org/models/"
_LPIPS = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/"
SOURCES: dict[Network, Sources] = {
    "vgg16": Sources(
        Source(
            f"{_TORCHVISION}vgg16-397923af.pth",
            "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
            "461dbd04e503516e496eecc969d40548b096ba63f8a5f4eb0a15941f8aadc796",
        ),
        Source(
            f"{_LPIPS}vgg.pth",
            "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
            "21828e4e236d09b3299c834ced590b9054f2311880d0153194e77e3a7f7c53fd",
        ),
    ),
    "alexnet": Sources(
        Source(
            f"{_TORCHVISION}alexnet-owt-7be5be79.pth",
            "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
            "dad556f11d2a50ed4dc90e8eebf7ef8d3494e51dc5dda06d7972984533778242",
        ),
        Source(
            f"{_LPIPS}alex.pth",
            "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
            "0131f4ccac9265c271fe0960a862abc7b9ea6f092e0431e8b15e235e7b2b960c",
        ),
    ),
}
"""The published weights: torchvision's of ImageNet, and version 0.1 of LPIPS's."""
KNOWN_FILES = {
    "vgg16_features.safetensors": "d201b17fa0a731c9c22b56e09ad88cade8f32216f3e3f983664e6b0cd155caae",
    "alexnet_features.safetensors": "a67ec15b8e5e89071d856d6b9c01e8218286ec3ae1cc2db2dfbd869ad0e63815",
    "lpips_vgg16_heads.safetensors": "a46d7602c5c3aadc48921924aa97d830c120a37808fa62d9b3013d991aa8f7b9",
    "lpips_alexnet_heads.safetensors": "3ca412029ee4d21d209fc1a32823152fb5aeb46e78fe742b6ff21a53d562ba19",
}
"""SHA-256 of the files of these names."""


class Weights(NamedTuple):
    """What was given of one network."""

    network: Network
    trunk: Trunk | None
    heads: tuple[Tensor, ...]
    """Empty where none were given."""
    record: dict[str, Any]
    """For JSON: ``network``, ``trunk_sha256`` and ``heads_sha256`` (of the tensors; None), ``published`` (whether they
    are the published ones), ``files`` (name -> SHA-256)."""


class Distance(NamedTuple):
    """What a model with ``recon_loss`` "vgg" trains with."""

    distance: Callable[[Tensor, Tensor], Tensor]
    """For ``families.set_perceptual``."""
    record: dict[str, Any]
    """For ``config.json`` and the checkpoints: ``network``, ``trunk_sha256``, ``published``, ``files``."""


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors with their names, types and shapes: the same in whatever file they are."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def advice(network: Network = "vgg16") -> str:
    """How to come by the weights of a network, for messages."""
    return (
        f"on a machine with internet: python jobs/fetch_weights.py --network {network} --out ~/weights/"
        f"{network}.safetensors, then add {FLAG} ~/weights/{network}.safetensors"
    )


def read_weights(paths: Sequence[str]) -> dict[Network, Weights]:
    """Read weights files, local or s3://, in any order; of each network its trunk, its heads or both.

    Raises:
        ValueError: a file is not there, is no such file, is damaged, is not what its name or its metadata says, or
            holds what another one holds, too.
    """
    trunks: dict[Network, tuple[Trunk, str]] = {}
    heads: dict[Network, tuple[tuple[Tensor, ...], str]] = {}
    files: dict[Network, dict[str, str]] = {}
    for path in paths:
        try:
            found, sha256 = _read_file(path)
        except ValueError as error:
            raise ValueError(f"{FLAG} {path}: {error}") from error
        network, trunk, own_heads, digests = found
        for part, taken in ((trunk, trunks), (own_heads, heads)):
            if part and network in taken:
                raise ValueError(f"{FLAG} {path} holds a part of {network} that another file holds, too; give one")
        if trunk is not None:
            trunks[network] = trunk, digests["trunk_sha256"]
        if own_heads:
            heads[network] = own_heads, digests["heads_sha256"]
        files.setdefault(network, {})[path.rsplit("/", 1)[-1]] = sha256
    read = {}
    for network, named in files.items():
        trunk, trunk_sha256 = trunks.get(network, (None, None))
        own_heads, heads_sha256 = heads.get(network, ((), None))
        known = SOURCES[network]
        record = {
            "network": network,
            "trunk_sha256": trunk_sha256,
            "heads_sha256": heads_sha256,
            "published": trunk_sha256 in (None, known.trunk.tensors_sha256)
            and heads_sha256 in (None, known.heads.tensors_sha256),
            "files": named,
        }
        read[network] = Weights(network, trunk, own_heads, record)
    return read


def needed(run: TrainRun) -> bool:
    """Whether the model of a run trains with VGG16 in any of its stages."""
    parts = (run.stage(index) for index in range(len(run.parsed_stages)))
    return any(getattr(part.model, "recon_loss", "mse") == "vgg" for part in parts)


def require(run: TrainRun) -> None:
    """Stop a run whose weights are not given; reads nothing, so that it is said at once.

    Raises:
        ValueError: the model trains with VGG16 and no weights are given, or they are given and it does not.
    """
    if needed(run) and not run.perceptual_weights:
        raise ValueError(f"model.recon_loss=vgg needs the weights of VGG16: {advice()} (or set model.recon_loss=mse)")
    if run.perceptual_weights and not needed(run):
        raise ValueError(
            f"{FLAG} is given, but the model does not train with them; set model.recon_loss=vgg, or leave them out"
        )


def open_distance(run: TrainRun, device: torch.device | str = "cpu") -> Distance | None:
    """What the model of a run trains with, on a device; None where it needs no weights.

    Raises:
        ValueError: as ``require`` and ``read_weights``; or the files hold no trunk of VGG16.
    """
    if not needed(run):
        return None
    require(run)
    read = read_weights(run.perceptual_weights)
    found = read.get("vgg16")
    if found is None or found.trunk is None:
        other = ", ".join(f"{'trunk' if weights.trunk else 'heads'} of {name}" for name, weights in read.items())
        raise ValueError(f"{FLAG} holds the {other}, but model.recon_loss=vgg needs the trunk of VGG16; {advice()}")
    kept = {name: value for name, value in found.record.items() if name != "heads_sha256"}
    kept["published"] = found.record["trunk_sha256"] == SOURCES["vgg16"].trunk.tensors_sha256
    return Distance(functools.partial(vgg_distance, trunk=found.trunk.to(device)), kept)


def note_on(distance: Distance | None) -> str:
    """What to say of weights that are not the published ones; empty where there is nothing to say."""
    if distance is None or distance.record["published"]:
        return ""
    return (
        f"note: {', '.join(distance.record['files'])} has VGG16's shapes but not its published weights, so this loss "
        f"is not the papers'; {advice()}"
    )


# ---- fetching ----------------------------------------------------------------------------------------------------


@store.job
def fetch_weights(
    run: "FetchWeightsRun",
    load: Callable[[BinaryIO], Mapping[str, Tensor]],
    sources: Mapping[Network, Sources] = SOURCES,
) -> str:
    """Write one safetensors file with a network's trunk and heads; return its path.

    Both come from the official files, which are downloaded, or from local ones: the same files, or safetensors with the
    names that they have here. LPIPS's heads are also part of torchmetrics, and taken from there if that is installed.

    Args:
        run: what to fetch.
        load: reads a ``.pth`` file; only called with files whose SHA-256 is the known one.
        sources: where the official files are and what they must hold.

    Raises:
        ValueError: a file cannot be had, or it is not the official one.
    """
    import safetensors.torch

    out = store.resolve(run.out or f"~/weights/{run.network}.safetensors", "--out")
    known = sources[run.network]
    with tempfile.TemporaryDirectory(prefix="objdyn-") as folder:
        trunk, trunk_source = _take("trunk", run.trunk, known.trunk, folder, load)
        installed = "" if run.heads else _installed_heads(known.heads)
        heads, heads_source = _take("heads", run.heads or installed, known.heads, folder, load)
    tensors = {**trunk, **heads}
    _parse(tensors)  # which refuses what is not whole
    claims = {
        "network": run.network,
        "trunk_sha256": digest(trunk),
        "heads_sha256": digest(heads),
        "trunk_source": trunk_source,
        "heads_source": heads_source,
    }
    metadata = {METADATA: json.dumps(claims, sort_keys=True)}
    if not store.is_url(out):
        os.makedirs(os.path.dirname(out), exist_ok=True)
    store.publish(out, safetensors.torch.save(dict(sorted(tensors.items())), metadata))
    return out


def _take(
    part: str, given: str, known: Source, folder: str, load: Callable[[BinaryIO], Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], str]:
    """The tensors of one part under their names here, from a file given or downloaded; and what that file is."""
    path = store.resolve(given, f"--{part}") if given else _download(known.url, folder, part)
    if not store.is_file(path):
        raise ValueError(f"--{part} {path} is not a file")
    data = store.read_bytes(path)  # once: what is loaded are the very bytes whose checksum is known
    found = hashlib.sha256(data).hexdigest()
    name = path.rsplit("/", 1)[-1]
    if path.endswith(".safetensors"):
        tensors, _ = _tensors(data, path)
    elif found == known.file_sha256:
        tensors = load(io.BytesIO(data))
    else:
        raise ValueError(
            f"{given or known.url} has SHA-256 {found}, but the official {known.url.rsplit('/', 1)[-1]} has "
            f"{known.file_sha256}; it is another file or damaged: fetch it again"
        )
    named = {f"heads.{name[3]}.weight": value for name, value in tensors.items() if name.startswith("lin")}
    kept = {**tensors, **named} if part == "heads" else tensors
    prefix = {"trunk": "features.", "heads": "heads."}[part]
    kept = {name: value.detach().contiguous() for name, value in kept.items() if name.startswith(prefix)}
    if (sha256 := digest(kept)) != known.tensors_sha256:
        raise ValueError(
            f"{given or known.url} does not hold the published {part}: SHA-256 of the tensors is {sha256}, wanted is "
            f"{known.tensors_sha256}; give the file of the right network, or fetch it again"
        )
    return kept, f"{name}, SHA-256 {found}"


def _download(url: str, folder: str, part: str) -> str:
    path = os.path.join(folder, url.rsplit("/", 1)[-1])
    print(f"downloading {url}", file=sys.stderr, flush=True)
    try:
        torch.hub.download_url_to_file(url, path, progress=sys.stderr.isatty())
    except OSError as error:  # of which URLError is one
        raise ValueError(
            f"cannot download {url} ({getattr(error, 'reason', None) or error}); run this on a machine with internet, "
            f"or fetch the file by other means and give --{part} FILE"
        ) from error
    return path


def _installed_heads(known: Source) -> str:
    """The official file of the heads where torchmetrics has brought it; empty where there is none."""
    spec = importlib.util.find_spec("torchmetrics")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = os.path.join(folder, "functional", "image", "lpips_models", known.url.rsplit("/", 1)[-1])
        if os.path.isfile(path) and store.sha256_file(path) == known.file_sha256:
            return path
    return ""


# ---- files -------------------------------------------------------------------------------------------------------

_Parsed = tuple[Network, Trunk | None, tuple[Tensor, ...], dict[str, str]]
"""Network, trunk, heads, and the digests of the parts that are there."""


def _read_file(path: str) -> tuple[_Parsed, str]:
    """What a weights file holds, and its SHA-256."""
    try:
        data = store.read_bytes(path)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"there is no such file; every machine that trains must see it. To make it, {advice()}") from (
            error
        )
    sha256 = hashlib.sha256(data).hexdigest()
    wanted = KNOWN_FILES.get(path.rsplit("/", 1)[-1], sha256)
    if sha256 != wanted:
        raise ValueError(f"the file of this name has SHA-256 {wanted}, but this one {sha256}; fetch it again")
    tensors, claims = _tensors(data, path)
    parsed = _parse(tensors)
    found = {"network": parsed[0], **parsed[3]}
    for name, value in claims.items():
        if name in ("network", "trunk_sha256", "heads_sha256") and found.get(name) != value:
            raise ValueError(
                f"its metadata says {name} {value}, but what it holds has {found.get(name)}; it is damaged or was "
                "edited: fetch it again"
            )
    return parsed, sha256


def _tensors(data: bytes, path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file, and what ``fetch_weights`` wrote of them into its metadata."""
    import safetensors
    import safetensors.torch

    try:
        tensors = safetensors.torch.load(data)
        (length,) = struct.unpack("<Q", data[:8])
        metadata = store.loads(data[8 : 8 + length]).get("__metadata__", {})
        claims = store.loads(metadata.get(METADATA, "{}"))
    except (safetensors.SafetensorError, ValueError) as error:
        kind = "a PyTorch file" if path.endswith((".pth", ".pt", ".bin")) else "not a safetensors file, or damaged"
        raise ValueError(
            f"it is {kind} ({error}); give what jobs/fetch_weights.py writes (which converts official .pth files, too)"
        ) from error
    return tensors, claims if isinstance(claims, dict) else {}


def _parse(tensors: Mapping[str, Tensor]) -> _Parsed:
    """Build what is there, or refuse it."""
    trunk_part = {name: tensor for name, tensor in tensors.items() if name.startswith("features.")}
    heads_part = {name: tensor for name, tensor in tensors.items() if name.startswith("heads.")}
    if not trunk_part and not heads_part:
        shown = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise ValueError(f"it holds neither a trunk (features.N.weight) nor heads (heads.N.weight) but {shown}")
    trunk = load_trunk(trunk_part) if trunk_part else None
    heads = tuple(heads_part.get(f"heads.{i}.weight", torch.zeros(0)) for i in range(5)) if heads_part else ()
    sizes = tuple(head.numel() for head in heads)
    network: Network | None = next((name for name, counts in CHANNELS.items() if counts == sizes), None)
    if trunk is not None:
        network = trunk.network
    if network is None:
        raise ValueError(f"it holds heads of {sizes} channels, but those of LPIPS have {dict(CHANNELS)}")
    digests = {"trunk_sha256": digest(trunk_part)} if trunk else {}
    if heads:
        check_heads(network, heads)
        digests["heads_sha256"] = digest(heads_part)
    return network, trunk, heads, digests
