"""Files, folders and names that a stranger may hand in, each made by code; hostile.py puts them everywhere.

Every maker takes the good world and a folder of the case's own, and writes into that. Checksums and seals always fit:
they keep nobody out who can compute them.
"""

import base64
import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import sqlite3
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard
from PIL import Image

from objdyn import clips as clip_module
from pipeline import shard, store

FOLDERS = ("videos", "data", "run", "tables")
SIZE, FRAMES = 64, 6
DIGITS = "9" * 1_000_000
DEEP = "[" * 100_000
Bytes = Callable[["World"], bytes]
Make = Callable[["World", Path], None]


# ---------------------------------------------------------------------------------------------------------------------
# What would run


class Trap:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, ran: Path, name: str) -> None:
        self.path = str(ran / name)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.open, (self.path, os.O_CREAT | os.O_WRONLY)


class World(NamedTuple):
    """Good folders, and what tells that an attack has come through."""

    root: Path
    videos: Path
    data: Path
    run: Path
    tables: Path
    ran: Path
    """Empty as long as nothing ran."""
    port: int
    """Of a server on the loopback that counts who calls."""

    def trap(self, name: str, protocol: int = 4) -> bytes:
        return pickle.dumps(Trap(self.ran, name), protocol)

    def good(self) -> bytes:
        return (self.videos / "a.mp4").read_bytes()


def object_npy(world: World, name: str) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Trap(world.ran, name)] * 4, object), allow_pickle=True)
    return buffer.getvalue()


def torch_file(world: World, name: str, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": Trap(world.ran, name)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def npy_header(shape: Sequence[int], descr: str = "'|u1'", version: bytes = b"\x01\x00") -> bytes:
    return raw_header(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {tuple(shape)}, }}", version)


def raw_header(text: str, version: bytes = b"\x01\x00") -> bytes:
    data = text.encode() + b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + version + struct.pack("<H" if version[0] == 1 else "<I", len(data)) + data


def zstd_of_zeros(size: int) -> bytes:
    """A frame that unpacks to so many zeros and does not say how many."""
    sink = io.BytesIO()
    with zstandard.ZstdCompressor(level=1).stream_writer(sink, closefd=False) as writer:
        for _ in range(size >> 20):
            writer.write(bytes(1 << 20))
    return sink.getvalue()


def zstd_claiming(size: int) -> bytes:
    """A frame that claims so many bytes and holds none."""
    # Magic, a descriptor that says "single segment, content size in 8 bytes", the size, and one empty last block.
    return struct.pack("<IBQ", 0xFD2FB528, 0xE0, size) + b"\x01\x00\x00"


def png(width: int, height: int, idat: bytes = b"", extra: bytes = b"") -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", idat) + chunk(b"IEND", b"")


def text_bomb() -> bytes:
    data = b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9)
    body = b"zTXt" + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def safetensors_file(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def tensor_header(shape: Sequence[int], begin: int, end: int) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}}).encode()


def pickled_parquet(world: World, table: pa.Table, name: str = "parquet") -> bytes:
    """A table whose every place for metadata holds a pickle: pandas' own, Arrow's Python extension type, ours."""
    trap = world.trap(name)
    text = base64.b64encode(trap)
    fields = []
    for field in table.schema:
        extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": trap}
        fields.append(field.with_metadata(extension))
    schema = pa.schema(fields, {**(table.schema.metadata or {}), b"pandas": trap, b"pickle": text})
    buffer = io.BytesIO()
    pq.write_table(table.cast(schema), buffer)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Folders that a stranger has made with the right checksums


def entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def seal(path: Path, value: Mapping[str, Any], **changes: Any) -> None:
    """Write sealed JSON; the seal keeps nobody out who can compute it."""
    path.write_bytes(store.sealed_json({**{k: v for k, v in value.items() if k != store.SEAL}, **changes}))


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes())


def members_of(world: World) -> dict[str, bytes]:
    """Members of a good clip of the dataset, without its key."""
    with tarfile.open(world.data / "train/shard-00000.tar") as tar:
        names = [name for name in tar.getnames() if name.startswith("train-v00000-c0000.")]
        return {name.partition(".")[2]: cast(Any, tar.extractfile(name)).read() for name in names}


def dataset(world: World, case: Path, changes: Mapping[str, bytes | None], key: str = "train-v00000-c0000") -> None:
    """Write a dataset of one clip whose members, sizes and sums all fit, with some members as a stranger wants them."""
    members = {name: data for name, data in {**members_of(world), **changes}.items() if data is not None}
    for split in ("train", "test"):
        folder, sink = case / "data" / split, io.BytesIO()
        folder.mkdir(parents=True)
        listed = []
        with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name in sorted(members):
                info = tarfile.TarInfo(f"{key[:60]}.{name}")
                info.size = len(members[name])
                listed.append({"name": name, "offset": sink.tell() + 512, "size": info.size})
                tar.addfile(info, io.BytesIO(members[name]))
        (folder / "shard-00000.tar").write_bytes(sink.getvalue())
        row = pq.read_table(world.data / "train/index.parquet").to_pylist()[0]
        table = pa.Table.from_pylist([{**row, "key": key, "members": listed}], schema=shard.INDEX_SCHEMA)
        list_dataset(world, folder, table, sink.getvalue())


def list_dataset(world: World, folder: Path, index: pa.Table | bytes, tar: bytes | None = None, **changes: Any) -> None:
    """Write index and manifest of a split."""
    if isinstance(index, pa.Table):
        buffer = io.BytesIO()
        pq.write_table(index, buffer, write_page_checksum=True)
        index = buffer.getvalue()
    (folder / "index.parquet").write_bytes(index)
    quarantine = (world.data / "train/quarantine.parquet").read_bytes()
    (folder / "quarantine.parquet").write_bytes(quarantine)
    fields = load(world.data / "train/manifest.json")
    fields["split"] = folder.name
    if tar is not None:
        fields["shards"] = [{"name": "shard-00000.tar", "samples": 1, **entry(tar)}]
        fields["clips"] = 1
        fields["balance"] = {**fields["balance"], "clips": 1}
    seal(folder / "manifest.json", fields, index=entry(index), **changes)


def copied(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Make:
    """A dataset with some fields of its manifest changed, sealed again."""

    def make(world: World, case: Path) -> None:
        for split in ("train", "test"):
            shutil.copytree(world.data / split, case / "data" / split)
            fields = load(case / "data" / split / "manifest.json")
            seal(case / "data" / split / "manifest.json", {**fields, **change(fields)})

    return make


def manifest_is(content: Bytes) -> Make:
    def make(world: World, case: Path) -> None:
        copied(lambda fields: {})(world, case)
        for split in ("train", "test"):
            (case / "data" / split / "manifest.json").write_bytes(content(world))

    return make


def first_shard(*changes: dict[str, Any]) -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
    return lambda fields: [{**fields["shards"][0], **change} for change in changes]


def with_files(files: Callable[[World], Mapping[str, bytes]]) -> Make:
    """A run whose newest checkpoint has other files, with sums that fit."""

    def make(world: World, case: Path) -> None:
        shutil.copytree(world.run, case / "run")
        folder = next((case / "run/checkpoints").iterdir())
        complete = load(folder / "COMPLETE")
        for name, data in files(world).items():
            (folder / name).write_bytes(data)
            complete[name] = entry(data)
        seal(folder / "COMPLETE", complete)

    return make


def state(world: World, **changes: Any) -> bytes:
    path = next((world.run / "checkpoints").iterdir()) / "state.json"
    return store.json_bytes({**json.loads(path.read_bytes()), **changes})


def model_settings(world: World, **changes: Any) -> bytes:
    path = next((world.run / "checkpoints").iterdir()) / "state.json"
    fields = json.loads(path.read_bytes())
    run = {**fields["run"], "model": {**fields["run"]["model"], **changes}}
    return state(world, run=run, **({"model": {**fields["model"], **changes}} if "model" in fields else {}))


def last(**changes: Any) -> Make:
    def make(world: World, case: Path) -> None:
        shutil.copytree(world.run, case / "run")
        seal(case / "run/last.json", load(case / "run/last.json"), **changes)

    return make


def config(**changes: Any) -> Make:
    def make(world: World, case: Path) -> None:
        shutil.copytree(world.run, case / "run")
        fields = load(case / "run/config.json")
        seal(case / "run/config.json", fields, run={**fields["run"], **changes})

    return make


def text(name: str, content: str | bytes) -> Make:
    return bytes_of(name, lambda world: content.encode() if isinstance(content, str) else content)


def bytes_of(name: str, content: Bytes) -> Make:
    def make(world: World, case: Path) -> None:
        (case / name).write_bytes(content(world))

    return make


def part(change: Callable[[World, pa.Table], bytes] | None = None, **fields: Any) -> Make:
    """A folder of tables with another first part of objects, or another manifest, all sums fitting."""

    def make(world: World, case: Path) -> None:
        shutil.copytree(world.tables, case / "tables")
        folder = case / "tables"
        manifest = load(folder / "manifest.json")
        first = manifest["parts"][0]
        path = folder / "objects" / f"{first['name']}.parquet"
        if change:
            data = change(world, pq.read_table(path))
            path.write_bytes(data)
            first["objects"] = {**first["objects"], **entry(data)}
            record = folder / "parts" / f"{first['name']}.json"
            seal(record, load(record), objects=first["objects"])
        made = {name: value(manifest) if callable(value) else value for name, value in fields.items()}
        seal(folder / "manifest.json", manifest, **made)

    return make


# ---------------------------------------------------------------------------------------------------------------------
# Sources


def playlists(world: World) -> dict[str, bytes]:
    """Texts that make FFmpeg open what stands in them, where it is let."""
    good, url = world.videos / "a.mp4", f"http://127.0.0.1:{world.port}"
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
    dash = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet>'
        f'<Representation id="0" bandwidth="9" mimeType="video/mp4"><BaseURL>{url}/dash.mp4</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>"
    )
    texts = {
        "hls-file.mp4": hls.format(f"file://{good}"),
        "hls-passwd.avi": hls.format("file:///etc/passwd"),
        "hls-http.mkv": hls.format(f"{url}/hls.ts"),
        "hls-concat.mov": hls.format(f"concat:{url}/header.m3u8|file:///etc/passwd"),
        "hls-header.gif": "GIF89a" + hls.format(f"{url}/gif.ts"),
        "concat.webm": f"ffconcat version 1.0\nfile '{good}'\n",
        "concat-http.mp4": f"ffconcat version 1.0\nfile {url}/concat.mp4\n",
        "dash.mp4": dash,
        "sdp.mp4": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "playlist-of-images.mp4": f"{good.parent}/%d.png",
    }
    return {name: content.encode() for name, content in texts.items()}


def outside_reference(good: bytes, path: str) -> bytes:
    """An mp4 whose samples lie in another file: its data reference names ``path`` instead of the file itself."""
    place = good.rindex(b"url \0\0\0\1") - 4  # moov follows mdat, so that no offset of a sample moves
    box = struct.pack(">I", 12 + len(path) + 1) + b"url \0\0\0\0" + path.encode() + b"\0"
    data = bytearray(good[:place] + box + good[place + 12 :])
    begin = good.index(b"mdat") + 4
    data[begin : good.rindex(b"moov") - 4] = bytes(
        good.rindex(b"moov") - 4 - begin
    )  # nothing to see in the file itself
    for kind in (b"dref", b"dinf", b"minf", b"mdia", b"trak", b"moov"):
        at = good.rindex(kind, 0, place) - 4
        data[at : at + 4] = struct.pack(">I", struct.unpack(">I", good[at : at + 4])[0] + len(box) - 12)
    return bytes(data)


def videos(world: World, case: Path) -> None:
    folder = case / "source"
    folder.mkdir()
    good = world.good()
    (folder / "0good.mp4").write_bytes(good)
    for name, data in playlists(world).items():
        (folder / name).write_bytes(data)
    for protocol in range(6):
        (folder / f"pickle{protocol}.mp4").write_bytes(world.trap(f"video-{protocol}", protocol))
    (folder / "torch.mp4").write_bytes(torch_file(world, "video-torch"))
    (folder / "outside.mp4").write_bytes(outside_reference(good, str(world.videos / "a.mp4")))
    (folder / "bomb.gif").write_bytes(
        b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;"
    )
    (folder / "svg.mp4").write_text('<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>')
    (folder / "new\nline.mp4").write_bytes(world.trap("newline"))
    (folder / ("long" * 60 + ".mp4")).write_bytes(b"no video")
    (folder / "pipe:touch x;.mp4").write_bytes(b"no video")


VIDEOS = {
    **dict.fromkeys(("hls-file.mp4", "hls-passwd.avi", "hls-http.mkv", "hls-concat.mov"), "unreadable"),
    **dict.fromkeys(("concat.webm", "concat-http.mp4", "dash.mp4", "sdp.mp4", "svg.mp4"), "unreadable"),
    **{f"pickle{protocol}.mp4": "unreadable" for protocol in range(6)},
    "torch.mp4": "unreadable",
    "new\nline.mp4": "unreadable",
    "pipe:touch x;.mp4": "unreadable",
    "hls-header.gif": "",
    "outside.mp4": "",
    "bomb.gif": "",
}


def images(world: World, case: Path) -> None:
    folder = case / "source"

    def put(name: str, data: bytes, suffix: str = "png") -> None:
        (folder / name).mkdir(parents=True)
        for i in range(FRAMES):
            (folder / name / f"{i}.{suffix}").write_bytes(data)

    buffer = io.BytesIO()
    Image.fromarray(np.full((SIZE, SIZE, 3), 90, np.uint8)).save(buffer, "PNG")
    put("0good", buffer.getvalue())
    put("claims", png(60_000, 60_000, zlib.compress(bytes(100))))
    put("zeros", png(9_000, 9_000, zlib.compress(bytes(9_000 * (1 + 3 * 9_000)), 9)))
    put("text", png(SIZE, SIZE, zlib.compress(bytes(SIZE * (1 + 3 * SIZE))), text_bomb()))
    put("pickle", world.trap("image"))
    put("svg", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>')
    put("mvg", f"push graphic-context\nfill 'url(http://127.0.0.1:{world.port}/mvg)'\npop graphic-context\n".encode())
    touch = f"%pipe%touch {world.ran}/ghostscript".encode()
    put("eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(" + touch + b") (w) file closefile\nshowpage\n")
    put(
        "jpeg",
        b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01" + bytes(99),
        "jpg",
    )
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "TIFF")
    put("tiff", buffer.getvalue())


IMAGES = {
    "claims": "too-large",
    "zeros": "too-large",
    "text": "unreadable",
    **dict.fromkeys(("pickle", "svg", "mvg", "eps", "tiff"), "unreadable"),
    "jpeg": "",
}


def arrays(world: World, case: Path) -> None:
    folder = case / "source"
    folder.mkdir()
    np.save(folder / "0good.npy", np.zeros((FRAMES, SIZE, SIZE, 3), np.uint8))
    put = {
        "objects.npy": object_npy(world, "npy"),
        "huge.npy": npy_header((1 << 60, SIZE, SIZE, 3)),
        "negative.npy": npy_header((-1, SIZE, SIZE, 3)),
        "bare.npy": world.trap("bare"),
        "structured.npy": npy_header((4,), "[('a', '|O'), ('b', '<f4')]") + world.trap("structured"),
        "version3.npy": npy_header((4, 8, 8, 3), version=b"\x03\x00"),
        "version2-long.npy": b"\x93NUMPY\x02\x00" + struct.pack("<I", 4_000_000_000) + b"x",
        "brackets.npy": raw_header("(" * 9000),
        "minus.npy": raw_header("-" * 9000 + "1"),
        "call.npy": raw_header(f"{{'descr': __import__('os').mkdir({str(world.ran / 'header')!r}), 'shape': ()}}"),
        "minus-short.npy": raw_header("-" * 900 + "1"),
        "unhashable.npy": raw_header("{" * 90 + "}" * 90),
        "digits.npy": raw_header("{'descr': '|u1', 'fortran_order': False, 'shape': (" + "9" * 8000 + ",)}"),
    }
    for name, data in put.items():
        (folder / name).write_bytes(data)


ARRAYS = {
    "objects.npy": "bad-layout",
    "huge.npy": "too-long",
    "negative.npy": "bad-layout",
    "structured.npy": "bad-layout",
    "version2-long.npy": "unreadable",
    **{
        f"{name}.npy": "unreadable"
        for name in ("bare", "version3", "brackets", "minus", "minus-short", "unhashable", "call")
    },
    "digits.npy": "",
}


def npz(members: Mapping[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def rollouts(world: World, case: Path) -> None:
    folder = case / "source"
    folder.mkdir()
    objects = np.zeros((FRAMES, 1, 14), np.float32)
    objects[:, 0, 8] = 1
    good = {
        "frames.npy": clip_module.to_npy(np.zeros((FRAMES, SIZE, SIZE), np.uint8)),
        "objects.npy": clip_module.to_npy(objects),
    }
    put = {
        "0good": npz(good),
        "objects": npz({**good, "objects.npy": object_npy(world, "npz")}),
        "frames": npz({**good, "frames.npy": object_npy(world, "npz-frames")}),
        "bomb": npz({**good, "frames.npy": npy_header((300_000, SIZE, SIZE)) + bytes(100_000_000)}),
        "claims": npz({**good, "frames.npy": npy_header((1 << 60, SIZE, SIZE))}),
        "pickle": world.trap("npz-bare"),
        "torch": torch_file(world, "npz-torch"),
        "traversal": npz({"../../../outside.npy": b"x", **{f"{i}.npy": b"" for i in range(2000)}}),
    }
    for name, data in put.items():
        (folder / f"{name}.npz").write_bytes(data)


ROLLOUTS = {
    **{f"{name}.npz": "bad-layout" for name in ("objects", "frames", "torch", "traversal")},
    "bomb.npz": "too-large",
    "claims.npz": "too-long",
    "pickle.npz": "unreadable",
}


def episodes(world: World, case: Path) -> None:
    folder, inside = case / "source", case / "inside"
    for each in (folder, inside):
        each.mkdir()
    imgs = np.zeros((1, FRAMES, SIZE, SIZE, 3), np.uint8)
    positions = np.zeros((1, FRAMES, 2, 2), np.float32)

    def write(name: str, fill: Callable[[h5py.File], Any], where: Path = folder) -> None:
        with h5py.File(where / name, "w") as file:
            fill(file)

    def plain(file: h5py.File) -> None:
        file["imgs"], file["positions"] = imgs, positions

    def virtual(file: h5py.File) -> None:
        layout = h5py.VirtualLayout(imgs.shape, np.uint8)
        layout[:] = h5py.VirtualSource(str(inside / "secret.h5"), "imgs", imgs.shape)
        file.create_virtual_dataset("imgs", layout)
        file["positions"] = positions

    def external(file: h5py.File) -> None:
        file["imgs"] = h5py.ExternalLink(str(inside / "secret.h5"), "imgs")
        file["positions"] = positions

    def raw(file: h5py.File) -> None:
        file.create_dataset("imgs", imgs.shape, np.uint8, external=[(str(inside / "secret.raw"), 0, imgs.nbytes)])
        file["positions"] = positions

    def soft(file: h5py.File) -> None:
        file["imgs"], file["positions"] = h5py.SoftLink("/imgs"), positions

    def claims(file: h5py.File) -> None:
        file.create_dataset("imgs", (1 << 40, FRAMES, SIZE, SIZE, 3), np.uint8, chunks=(1, FRAMES, SIZE, SIZE, 3))
        file["positions"] = positions

    def objects(file: h5py.File) -> None:
        file["imgs"] = imgs
        pickled = np.frombuffer(world.trap("hdf5"), np.uint8)
        file.create_dataset("positions", (1, FRAMES, 2, 2), h5py.vlen_dtype(np.uint8))[0, 0, 0, 0] = pickled
        file.attrs["pickle"] = np.void(world.trap("attribute"))

    def bomb(file: h5py.File) -> None:
        chunk = zlib.compress(bytes(3 * 1200 * 1200), 9)
        made = file.create_dataset(
            "imgs", (1, 300, 1200, 1200, 3), np.uint8, chunks=(1, 1, 1200, 1200, 3), compression=9
        )
        for i in range(300):
            made.id.write_direct_chunk((0, i, 0, 0, 0), chunk)
        file["positions"] = np.zeros((1, 300, 2, 2), np.float32)

    def chunk_bomb(file: h5py.File) -> None:
        shape, chunk = imgs.shape, (40_000, *imgs.shape[1:])
        made = file.create_dataset("imgs", shape, np.uint8, chunks=chunk, maxshape=(None, *shape[1:]), compression=9)
        made.id.write_direct_chunk((0,) * 5, zlib.compress(bytes(1000)))
        file["positions"] = positions

    write("secret.h5", plain, inside)
    (inside / "secret.raw").write_bytes(imgs.tobytes())
    for name, fill in (
        ("0good", plain), ("virtual", virtual), ("external", external), ("raw", raw), ("soft", soft),
        ("claims", claims), ("objects", objects), ("bomb", bomb), ("chunk", chunk_bomb),
    ):  # fmt: skip
        write(f"{name}.h5", fill)
    (folder / "pickle.h5").write_bytes(world.trap("h5"))


EPISODES = {f"{name}.h5": "bad-layout" for name in ("virtual", "external", "raw", "soft", "claims", "objects")}
EPISODES |= {"pickle.h5": "unreadable", "bomb.h5": "bad-layout", "chunk.h5": "bad-layout"}


def groups(world: World, case: Path) -> None:
    folder = case / "source"
    folder.mkdir()
    features = np.zeros((FRAMES, 1, SIZE, SIZE, 1), np.uint8)
    for name in ("0good", "link", "external", "claims"):
        with h5py.File(folder / f"{name}.h5", "w") as file:
            if name == "link":
                file["training"] = h5py.ExternalLink(str(folder / "0good.h5"), "training")
                continue
            group = file.create_group("training")
            if name == "0good":
                group["features"] = features
            elif name == "external":
                group["features"] = h5py.ExternalLink(str(folder / "0good.h5"), "training/features")
            else:
                group.create_dataset(
                    "features", (FRAMES, 1 << 40, SIZE, SIZE, 1), np.uint8, chunks=(FRAMES, 1, 8, 8, 1)
                )


GROUPS = {f"{name}.h5/training": "bad-layout" for name in ("link", "external", "claims")}


def tars(world: World, case: Path) -> None:
    folder = case / "source"
    folder.mkdir()
    good = world.good()

    def write(name: str, *members: tuple[tarfile.TarInfo, bytes], format_: int = tarfile.PAX_FORMAT) -> None:
        with tarfile.open(folder / f"{name}.tar", "w", format=format_) as tar:
            for info, data in members:
                tar.addfile(info, io.BytesIO(data) if info.isreg() else None)

    def regular(name: str, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        return info, data

    def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.devmajor, info.devminor = kind, target, 1, 3
        return info, b""

    write("0good", regular("a.mp4", good))
    write(
        "links",
        special("sym.mp4", tarfile.SYMTYPE, str(world.videos / "a.mp4")),
        special("hard.mp4", tarfile.LNKTYPE, "/etc/passwd"),
        special("device.mp4", tarfile.CHRTYPE),
        special("block.mp4", tarfile.BLKTYPE),
        special("fifo.mp4", tarfile.FIFOTYPE),
    )
    write(
        "names",
        regular("../../traversal.mp4", good),
        regular("/absolute.mp4", good),
        regular("pipe:touch x.mp4", good),
        regular("new\nline.mp4", b"no video"),
        regular("x" * 5000 + ".mp4", b"no video"),
    )
    write("pickles", *[regular(f"{i}.mp4", world.trap(f"tar-{i}", i)) for i in range(6)])
    write("playlists", *[regular(name, data) for name, data in playlists(world).items() if name.endswith("mp4")])
    (folder / "pickle.tar").write_bytes(world.trap("tar"))
    header = bytearray(tarfile.TarInfo("huge.mp4").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + (1 << 60).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (folder / "claims.tar").write_bytes(bytes(header) + bytes(1024))
    info = tarfile.TarInfo("long.mp4")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, (8 << 30) - 1
    (folder / "longname.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    pax = tarfile.TarInfo("pax")
    pax.type, pax.size = tarfile.XHDTYPE, (8 << 30) - 1
    (folder / "pax.tar").write_bytes(pax.tobuf(tarfile.USTAR_FORMAT) + bytes(2048))
    (folder / "gzip.tar").write_bytes(gzip.compress(bytes(200_000_000), 1))


TARS = {
    "links.tar": None,
    **{f"pickles.tar/{i}.mp4": "unreadable" for i in range(6)},
    "pickle.tar": "damaged-tar",
    "claims.tar": "",
    "longname.tar": "damaged-tar",
    "pax.tar": "damaged-tar",
    "gzip.tar": "damaged-tar",
}
TARS = {name: code for name, code in TARS.items() if code is not None}


def annotated(world: World, case: Path) -> None:
    folder = case / "source" / "train"
    folder.mkdir(parents=True)
    good = world.good()
    notes = {
        "deep": DEEP,
        "digits": f'{{"scene_index": {DIGITS}}}',
        "infinite": '{"scene_index": 1e999999999}',
        "pickle": world.trap("annotation"),
        "nulls": "[" + "null," * 1_000_000 + "null]",
        "ids": '{"object_property": [{"object_id": 999999999999999}]}',
    }
    for i, content in enumerate(notes.values()):
        (folder / f"video_{i:05d}.mp4").write_bytes(good)
        data = content if isinstance(content, bytes) else content.encode()
        (folder / f"annotation_{i:05d}.json").write_bytes(data)
    masks = [
        zstd_claiming(1 << 60),
        zstd_of_zeros(1 << 30),
        world.trap("mask"),
        object_npy(world, "mask-npy"),
    ]
    for i, data in enumerate(masks):
        (folder / f"mask_{i:05d}.npy.zst").write_bytes(data)
    proposal = {"frames": [{"frame_index": 0, "objects": [{"mask": {"size": [SIZE, SIZE], "counts": "~~~~~~~~"}}]}]}
    (folder / "proposal_00004.json").write_text(json.dumps(proposal))


def fifo(world: World, case: Path) -> None:
    (case / "source").mkdir()
    (case / "source/0good.mp4").write_bytes(world.good())
    os.mkfifo(case / "source/fifo.mp4")
    (case / "source/zero.mp4").symlink_to("/dev/zero")


FIFOS = {"fifo.mp4": "no-file", "zero.mp4": "no-file"}

NAMES = {
    "pipe": "pipe:touch x",
    "http": "http://127.0.0.1/x.tar",
    "file": "file:///etc/passwd",
    "traversal": "../../outside.tar",
    "absolute": "/etc/passwd",
    "hidden": ".shard.tar",
    "newline": "shard\n.tar",
    "nul": "shard\0.tar",
    "long": "s" * 100_000,
}


ZST = "frames.npy.zst"
WEBP = b"RIFF\xff\xff\xff\x7fWEBPVP8L\xff\xff\0\0\x2f\xff\xff\xff\x0f" + bytes(99)


def meta(world: World, **changes: Any) -> bytes:
    return json.dumps({**json.loads(members_of(world)["json"]), **changes}).encode()


def huge_index(world: World) -> bytes:
    """An index that claims 2^40 rows in its footer, by a patched varint of thrift."""
    table = pa.table({"key": pa.array(["a"] * 64, pa.string())})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="none", use_dictionary=False)
    return buffer.getvalue().replace(b"\x80\x01", b"\xfe\x7f")


def zeros_index(world: World) -> bytes:
    """A small file that unpacks to gigabytes: one row repeated, dictionary and run lengths."""
    row = pq.read_table(world.data / "train/index.parquet").slice(0, 1)
    keys = pa.array(["k" * 1000]).dictionary_encode().take(pa.array(np.zeros(3_000_000, np.int32)))
    names = pa.array(["shard-00000.tar"]).dictionary_encode().take(pa.array(np.zeros(3_000_000, np.int32)))
    members = pa.array([[]], row.schema.field("members").type).take(pa.array(np.zeros(3_000_000, np.int32)))
    buffer = io.BytesIO()
    pq.write_table(pa.table({"shard": names, "key": keys, "members": members}), buffer, row_group_size=1 << 26)
    return buffer.getvalue()


def indexed(make: Bytes, **changes: Any) -> Make:
    def put(world: World, case: Path) -> None:
        for split in ("train", "test"):
            shutil.copytree(world.data / split, case / "data" / split)
            list_dataset(world, case / "data" / split, make(world), **changes)

    return put


def good_index(world: World) -> pa.Table:
    return pq.read_table(world.data / "train/index.parquet")


def pickled_index(world: World) -> bytes:
    return pickled_parquet(world, good_index(world), "index")


def members_at(offset: int, size: int) -> Bytes:
    def make(world: World) -> bytes:
        rows = good_index(world).to_pylist()
        rows[0]["members"][0].update(offset=offset, size=size)
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=shard.INDEX_SCHEMA), buffer)
        return buffer.getvalue()

    return make


MANIFESTS = {
    "deep": manifest_is(lambda w: DEEP.encode()),
    "digits": manifest_is(lambda w: f'{{"a": {DIGITS}}}'.encode()),
    "a pickle": manifest_is(lambda w: w.trap("manifest")),
    "huge geometry": copied(lambda f: {"frames": 1 << 60, "height": 1 << 40}),
    "huge numbers of samples": copied(lambda f: {"clips": 1 << 50, "shards": first_shard({"samples": 1 << 50})(f)}),
    "negative numbers of samples": copied(lambda f: {"shards": first_shard({"samples": -4}, {"samples": 6})(f)}),
    "strange types": copied(lambda f: {"frames": [1], "shards": [{"name": 3}]}),
}


def named_shard(name: str) -> Make:
    return copied(lambda fields: {"shards": first_shard({"name": name})(fields)})


def named_part(name: str) -> Make:
    return part(parts=lambda manifest: [{**manifest["parts"][0], "name": name}])


def pipe_at(name: str) -> Make:
    """Copy dataset, run and tables; one file is a pipe that nobody writes into."""

    def make(world: World, case: Path) -> None:
        for folder in FOLDERS:
            shutil.copytree(world.root / folder, case / folder)
        path = next(case.glob(name))
        path.unlink()
        os.mkfifo(path)

    return make


PATHS = {"a path": "../../../outside", "absolute": "/etc/passwd", "long": "a" * 100_000}
CHECKSUMS = {
    **{
        f"checksum of a shard: {n}": copied(lambda f, v=v: {"shards": first_shard({"sha256": v})(f)})
        for n, v in PATHS.items()
    },
    **{
        f"checksum of the index: {n}": copied(lambda f, v=v: {"index": {**f["index"], "sha256": v}})
        for n, v in PATHS.items()
    },
}
CLIPS: dict[str, Callable[["World"], Mapping[str, bytes | None]]] = {
    "an object array as truth": lambda w: {"positions.npy": object_npy(w, "truth")},
    "an object array as frames": lambda w: {ZST: None, "frames.npy": object_npy(w, "frames")},
    "an object array under zstd": lambda w: {ZST: zstandard.compress(object_npy(w, "zst"))},
    "a pickle as json": lambda w: {"json": w.trap("json")},
    "a pickle as webp": lambda w: {ZST: None, "frames.webp": w.trap("webp")},
    "a torch file beside": lambda w: {"weights.pth": torch_file(w, "pth")},
    "a pickle beside": lambda w: {"cls.pyd": w.trap("pyd"), "x.pickle": w.trap("pickle")},
    "2^60 pixels": lambda w: {ZST: None, "frames.npy": npy_header((1 << 60, 8, 8, 3))},
    "2^60 pixels in json too": lambda w: {"json": meta(w, frames=1 << 60)},
    "truth of 2^60 elements": lambda w: {"positions.npy": npy_header((FRAMES, 1 << 58, 2), "'<f4'")},
    "truth of a negative shape": lambda w: {"positions.npy": npy_header((FRAMES, -1, 2), "'<f4'")},
    "zstd that claims 2^60 bytes": lambda w: {ZST: zstd_claiming(1 << 60)},
    "zstd of a gigabyte of zeros": lambda w: {ZST: zstd_of_zeros(1 << 30)},
    "a deep json": lambda w: {"json": DEEP.encode()},
    "a json of a million digits": lambda w: {"json": f'{{"frames": {DIGITS}}}'.encode()},
    "a json of a huge string": lambda w: {"json": meta(w, source="s" * 10_000_000, fps="f" * 10_000_000)},
    "infinite numbers": lambda w: {"json": meta(w, fps=float("inf"), stride=10**300)},
    "an infinite length": lambda w: {"json": json.dumps({"frames": float("inf")}).encode()},
    "an npy header of minus signs": lambda w: {"positions.npy": raw_header("-" * 9000 + "1")},
    "an npy header of brackets": lambda w: {"positions.npy": raw_header("(" * 9000)},
    "an npy header of dictionaries": lambda w: {"positions.npy": raw_header("{" * 90 + "}" * 90)},
    "a webp bomb": lambda w: {ZST: None, "frames.webp": WEBP},
}
KEYS = {"a path": "../../../etc/passwd", "a newline": "a\nb", "a very long one": "K" * 1_000_000}
INDICES: dict[str, Bytes] = {
    "a pickle": lambda w: w.trap("index"),
    "members outside": members_at(1 << 62, 1 << 62),
    "members before": members_at(-(1 << 62), 99),
    "a claimed row count": huge_index,
    "gigabytes of one row": zeros_index,
}


WEIGHTS: dict[str, Bytes] = {
    "a torch file": lambda w: torch_file(w, "model"),
    "an old torch file": lambda w: torch_file(w, "model-old", zipped=False),
    **{f"a pickle of protocol {n}": (lambda w, n=n: w.trap(f"model-{n}", n)) for n in (0, 2, 5)},
    "a header of 2^63 bytes": lambda w: struct.pack("<Q", 1 << 63) + b"{}",
    "a header of 90 MB": lambda w: struct.pack("<Q", 90_000_000) + b" " * 90_000_000,
    "tensors of 2^60 elements": lambda w: safetensors_file(tensor_header((1 << 60,), 0, 1 << 62)),
    "a product that wraps": lambda w: safetensors_file(tensor_header((1 << 33, 1 << 33), 0, 0)),
    "overlapping tensors": lambda w: safetensors_file(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}',
        bytes(12),
    ),
    "offsets turned round": lambda w: safetensors_file(tensor_header((2,), 8, 0), bytes(8)),
    "a deep header": lambda w: safetensors_file(DEEP.encode()),
    "a header of digits": lambda w: safetensors_file(f'{{"a":{DIGITS}}}'.encode()),
    "a huge name": lambda w: safetensors_file(
        json.dumps({"n" * 1_000_000: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode(), bytes(4)
    ),
    "complex numbers": lambda w: safetensors_file(
        json.dumps({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}).encode(), bytes(8)
    ),
}
FOREIGN: dict[str, Bytes] = {"weights that are a torch file": lambda w: torch_file(w, "foreign")}
STATES: dict[str, Bytes] = {
    "a pickle": lambda w: w.trap("state"),
    "deep": lambda w: DEEP.encode(),
    "digits": lambda w: f'{{"schema": 1, "step": {DIGITS}}}'.encode(),
    "a list": lambda w: b"[]",
    "another family": lambda w: state(w, family="os.system"),
    "a family that is no name": lambda w: state(w, family=["ddlp"]),
    "a huge string": lambda w: state(w, family="f" * 10_000_000),
}
STATE_MODELS: dict[str, Bytes] = {
    "a model of terabytes": lambda w: model_settings(w, pint_dim=1 << 24),
    "a model of 2^60 particles": lambda w: model_settings(w, num_particles=1 << 60),
    "a model of words": lambda w: model_settings(w, num_particles="__import__('os')"),
    "a model of other types": lambda w: model_settings(w, num_particles={"a": 1}, pint_dim=[1]),
}
TEXTS: dict[str, Bytes | bytes | str] = {
    "deep": DEEP,
    "digits": f'{{"a": {DIGITS}}}',
    "a pickle": lambda w: w.trap("text"),
    "yaml": "!!python/object/apply:os.system ['touch x']",
    "bytes": b"\xff\xfe\x00\x80",
}
EDITS: dict[str, Bytes | bytes | str] = {
    "a number of digits": f'[{{"name": "a", "select": "all", "scale": {DIGITS}}}]',
    "infinite": '[{"name": "a", "select": "all", "scale": 1e999}]',
    "traversal": '[{"name": "../../a", "select": "all"}]',
    "a huge name": '[{"name": "' + "a" * 10_000_000 + '", "select": "all"}]',
    "a huge selection": '[{"name": "a", "select": "index:' + "9," * 1_000_000 + '9"}]',
    "a huge index": '[{"name": "a", "select": "index:' + "9" * 5000 + '"}]',
    "code": '[{"name": "a", "select": "__import__(\'os\').system(\'touch x\')"}]',
}
QUESTIONS: dict[str, Bytes | bytes | str] = {
    **TEXTS,
    "a deep program": '[{"scene_index": 0, "questions": [{"program": ' + "[" * 900 + "]" * 900 + "}]}]",
    "a huge string": '[{"scene_index": 0, "video_filename": "' + "v" * 10_000_000 + '", "questions": 3}]',
    "code": '[{"scene_index": 0, "questions": [{"question_type": "descriptive", "program": ["__import__(\'os\')"]}]}]',
}


def bytes_table(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, write_page_checksum=True)
    return buffer.getvalue()


def described(world: World, table: pa.Table, description: Any) -> bytes:
    content = description if isinstance(description, bytes) else json.dumps(description).encode()
    return bytes_table(table.replace_schema_metadata({b"objdyn": content}))


def repeated(world: World, table: pa.Table) -> bytes:
    """A small part that unpacks to tens of gigabytes."""
    rows = table.slice(0, 1)
    columns = []
    for column, field in zip(rows.columns, rows.schema, strict=True):
        if pa.types.is_string(field.type):
            column = pa.array(["x" * 4000]).dictionary_encode().take(pa.array(np.zeros(1 << 22, np.int32)))
            columns.append(column)
        else:
            columns.append(column.combine_chunks().take(pa.array(np.zeros(1 << 22, np.int32))))
    buffer = io.BytesIO()
    whole = pa.table(columns, names=rows.schema.names).replace_schema_metadata(rows.schema.metadata)
    pq.write_table(whole, buffer, row_group_size=1 << 26)
    return buffer.getvalue()


PARTS: dict[str, Callable[[World, pa.Table], bytes]] = {
    "a pickle": lambda w, t: w.trap("part"),
    "metadata that are a pickle": lambda w, t: described(w, t, w.trap("metadata")),
    "deep metadata": lambda w, t: described(w, t, DEEP.encode()),
    "metadata of digits": lambda w, t: described(w, t, f'{{"schema": {DIGITS}}}'.encode()),
    "metadata that are a list": lambda w, t: described(w, t, [1]),
    "metadata without a table": lambda w, t: described(w, t, {"schema": 1}),
    "shapes of 2^60": lambda w, t: described(
        w, t, {**json.loads(t.schema.metadata[b"objdyn"]), "shapes": {"features": [1 << 60, 1 << 60]}}
    ),
    "strange shapes": lambda w, t: described(w, t, {**json.loads(t.schema.metadata[b"objdyn"]), "shapes": "../.."}),
    "no key": lambda w, t: bytes_table(t.drop_columns(["clip"])),
    "a key of other types": lambda w, t: bytes_table(
        t.set_column(0, "clip", pa.array([b"x"] * t.num_rows)).replace_schema_metadata(t.schema.metadata)
    ),
    "nulls in the key": lambda w, t: bytes_table(
        t.set_column(0, "clip", pa.nulls(t.num_rows, pa.string())).replace_schema_metadata(t.schema.metadata)
    ),
    "no rows": lambda w, t: bytes_table(t.slice(0, 0)),
    "gigabytes of one row": repeated,
}
NUMBERS: dict[str, Callable[[World, pa.Table], bytes]] = {
    "huge frame numbers": lambda w, t: bytes_table(
        t.set_column(
            t.schema.get_field_index("frame"), "frame", pa.array(np.full(t.num_rows, 2**31 - 1, np.int32))
        ).replace_schema_metadata(t.schema.metadata)
    ),
}


def copied_sweep(world: World, case: Path) -> None:
    shutil.copytree(world.root / "sweep", case / "sweep")


def pickled_study(world: World, case: Path) -> None:
    copied_sweep(world, case)
    (case / "sweep/study.db").write_bytes(world.trap("study"))


def sql(statement: str) -> Make:
    def make(world: World, case: Path) -> None:
        copied_sweep(world, case)
        connection = sqlite3.connect(case / "sweep/study.db")
        with connection:
            connection.execute(statement)
        connection.close()

    return make


def trial_attribute(key: str, value: Any) -> str:
    """Give every trial an attribute, as somebody would who may write to the storage."""
    return (
        "insert or replace into trial_user_attributes(trial_id, key, value_json) "
        f"select trial_id, '{key}', '{json.dumps(value)}' from trials"
    )


def plan_is(value: str) -> str:
    return f"update study_user_attributes set value_json = '{value}' where key = 'plan'"


STUDIES = {
    "a pickle": pickled_study,
    "a plan that is deep": sql(plan_is(DEEP)),
    "a plan of digits": sql(plan_is(DIGITS)),
    "a plan of a string": sql(plan_is('"x"')),
    "no plan": sql("delete from study_user_attributes"),
    "a deep attribute": sql(
        f"insert into trial_user_attributes(trial_id, key, value_json) select trial_id, 'x', '{DEEP}' from trials"
    ),
    "a distribution of a class": sql(
        'update trial_params set distribution_json = \'{"name": "os.system", "attributes": {}}\''
    ),
}
PASSED_OVER = {
    "a folder outside": sql(trial_attribute("folder", "../../../outside")),
    "an absolute folder": sql(trial_attribute("folder", "/etc")),
    "a picture outside": sql(trial_attribute("picture", "../../../../etc/passwd")),
    "strange values of seeds": sql(trial_attribute("seed_values", "x")),
    "a trigger": sql("create trigger t after insert on trials begin select load_extension('x'); end"),
}
"""Of a storage: what the sweep does not ask for."""
JOURNALS: dict[str, Bytes | bytes | str] = {
    "brackets": DEEP + "\n",
    "digits": DIGITS + "\n",
    "yaml": "!!python/object/apply:os.system ['touch x']\n",
    "an unknown step": '{"op_code": 99, "worker_id": "x"}\n',
    "a list": "[]\n",
    "bytes": b"\xff\xfe\x80\n",
    "a pickle": lambda w: w.trap("journal") + b"\n",
}
