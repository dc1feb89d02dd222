#!/usr/bin/env python3
"""Writes a container image of a few programs without a container engine: an OCI image layout in one tar file.

The image holds the programs, the shared libraries that they need (as the dynamic loader finds them on this machine, with the
licence texts and package records of the Debian packages that they come from), Debian's CA certificates, and a user 65532
`nonroot`. There is no shell and no package manager in it.

The same files give the same image: entries are sorted, times are 0, owners are 0. The tag is made of the image's own
digest, which covers the uncompressed layers and the configuration, so that a changed program has a new tag.
"""

import argparse
import glob
import gzip
import hashlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import tarfile

NONROOT = 65532
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
CERTIFICATES = "/usr/share/ca-certificates/mozilla/*.crt"  # not the machine's bundle, which may hold local authorities
BUNDLE = "etc/ssl/certs/ca-certificates.crt"


class Files:
    """A file tree in memory: path without leading slash -> (mode, content)."""

    def __init__(self):
        self.files = {}
        self.directories = {}

    def add(self, path, content, mode=0o644):
        path = os.path.normpath(path).lstrip("/")
        self.files[path] = (mode, content)
        while path := os.path.dirname(path):
            self.directories.setdefault(path, 0o755)

    def directory(self, path, mode=0o755):
        self.directories[path] = mode

    def tar(self):
        """The tree as tar bytes, the same for the same tree."""
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for path in sorted(self.directories.keys() | self.files.keys()):
                entry = tarfile.TarInfo(path)
                if path in self.directories:
                    entry.type, entry.mode = tarfile.DIRTYPE, self.directories[path]
                    archive.addfile(entry)
                else:
                    entry.mode, content = self.files[path]
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
        return out.getvalue()

    def write(self, root):
        """The tree under a directory, for a Containerfile to copy."""
        for path in sorted(self.directories):
            os.makedirs(os.path.join(root, path), exist_ok=True)
            os.chmod(os.path.join(root, path), self.directories[path])
        for path, (mode, content) in self.files.items():
            with open(os.path.join(root, path), "wb") as file:
                file.write(content)
            os.chmod(os.path.join(root, path), mode)


def read(path):
    with open(path, "rb") as file:
        return file.read()


def libraries(program, places=()):
    """Paths of the shared libraries and the loader that a program needs, as its own loader resolves them; it looks into `places` first."""
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C"}
    if places:
        environment["LD_LIBRARY_PATH"] = ":".join(sorted(places))
    run = subprocess.run(["ldd", program], capture_output=True, text=True, env=environment)
    if "not a dynamic executable" in run.stdout + run.stderr or "statically linked" in run.stdout:
        return set()
    if run.returncode != 0:
        sys.exit(f"ldd {program}: {run.stderr.strip() or run.stdout.strip()}")
    if missing := re.findall(r"^\s*(\S+) => not found", run.stdout, re.MULTILINE):
        sys.exit(f"{program} needs {', '.join(missing)}, which this machine does not have: install it, then build again")
    return set(re.findall(r"(?:=> |^\s*)(/\S+) \(0x", run.stdout, re.MULTILINE))


def packages(paths):
    """The Debian packages that files come from; none on a machine without dpkg."""
    # a package may list /lib/x for what is now /usr/lib/x
    spellings = {spelling for path in paths for real in [os.path.realpath(path)] for spelling in (path, real, real.removeprefix("/usr"))}
    try:
        run = subprocess.run(["dpkg", "-S", *sorted(spellings)], capture_output=True, text=True)
    except FileNotFoundError:
        return set()
    return {line.split(":")[0] for line in run.stdout.splitlines() if not line.startswith("diversion")}


def base_layer(programs, opened=()):
    """All but the programs: libraries (also those that the `opened` ones need), certificates, user, /tmp."""
    files = Files()
    # What lies beside an opened library is opened too, and comes with it.
    places = {os.path.dirname(os.path.realpath(library)) for library in opened}
    needed = set().union(*(libraries(program, places) for program in [*programs, *opened]))
    needed = {library for library in needed if os.path.dirname(os.path.realpath(library)) not in places}
    certificates = sorted(glob.glob(CERTIFICATES))
    if not certificates:
        sys.exit(f"no {CERTIFICATES}: install the package ca-certificates")
    for library in sorted(needed):
        files.add(library, read(library), 0o755)
    for package in sorted(packages(needed | set(certificates[:1]))):
        if os.path.exists(copyright_text := f"/usr/share/doc/{package}/copyright"):
            files.add(copyright_text, read(copyright_text))
        status = subprocess.run(["dpkg-query", "--status", package], capture_output=True, check=True).stdout
        files.add(f"var/lib/dpkg/status.d/{package}", status)  # where image scanners look
    files.add(BUNDLE, b"".join(read(certificate).rstrip(b"\n") + b"\n" for certificate in certificates))
    files.add("etc/passwd", f"root:x:0:0:root:/:/sbin/nologin\nnonroot:x:{NONROOT}:{NONROOT}::/tmp:/sbin/nologin\n".encode())
    files.add("etc/group", f"root:x:0:\nnonroot:x:{NONROOT}:\n".encode())
    files.directory("tmp", 0o1777)
    return files


def program_layer(programs):
    files = Files()
    for program in programs:
        files.add(f"usr/bin/{os.path.basename(program)}", read(program), 0o755)
    return files


def opened_layer(opened):
    """Libraries that a program opens by itself or is linked with, to /usr/lib/joulecast, with the licence texts that lie beside them."""
    files = Files()
    for library in opened:
        name = os.path.basename(library)
        files.add(f"usr/lib/joulecast/{name}", read(library), 0o755)
        for text in ("LICENSE", "ThirdPartyNotices.txt"):
            if os.path.exists(path := os.path.join(os.path.dirname(library), text)):
                files.add(f"usr/share/doc/{name.split('.')[0]}/{text}", read(path))
    return files


def directory_layer(source, target):
    """The files under a directory, at another place in the image, for everyone to read."""
    files = Files()
    for directory, names, found in os.walk(source):
        names.sort()
        for name in found:
            path = os.path.join(directory, name)
            files.add(os.path.join(target, os.path.relpath(path, source)), read(path))
    if not files.files:
        sys.exit(f"{source} holds no files")
    return files


def layers_there(out, name, configuration):
    """The packed sizes of the layers of an image that an earlier run wrote; None if the file holds another image, or none.

    Packing is what takes the time, and the configuration's digest covers the unpacked layers.
    """
    try:
        with tarfile.open(out) as archive:
            manifest = json.load(archive.extractfile("index.json"))["manifests"][0]
            if manifest["annotations"]["io.containerd.image.name"] != name:
                return None
            manifest = json.load(archive.extractfile("blobs/" + manifest["digest"].replace(":", "/")))
    except (OSError, KeyError, ValueError, tarfile.TarError):
        return None
    return [layer["size"] for layer in manifest["layers"]] if manifest["config"]["digest"] == configuration else None


def write_image(layers, user, entrypoint, name, tag, out):
    """Writes the OCI layout, if it is not there already; returns the full name and what each layer weighs, plain and packed."""
    blobs, descriptors = {}, []

    def blob(content, media_type):
        digest = hashlib.sha256(content).hexdigest()
        blobs[digest] = content
        return {"mediaType": f"application/vnd.oci.image.{media_type}", "digest": f"sha256:{digest}", "size": len(content)}

    tars = [files.tar() for files in layers]
    diff_ids = ["sha256:" + hashlib.sha256(plain).hexdigest() for plain in tars]
    architecture = ARCHITECTURES.get(platform.machine(), platform.machine())
    configuration = {
        "created": "1970-01-01T00:00:00Z",
        "architecture": architecture,
        "os": "linux",
        "config": {
            "User": f"{user}:{user}",
            "Env": ["PATH=/usr/bin", f"SSL_CERT_FILE=/{BUNDLE}"],
            "Entrypoint": [entrypoint],
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    configuration_blob = blob(json.dumps(configuration, sort_keys=True).encode(), "config.v1+json")
    tag = tag or "dev-" + configuration_blob["digest"].removeprefix("sha256:")[:12]
    if (packed := layers_there(out, f"{name}:{tag}", configuration_blob["digest"])) is not None:
        return f"{name}:{tag}", list(zip(map(len, tars), packed))
    for plain in tars:
        descriptors.append(blob(gzip.compress(plain, compresslevel=6, mtime=0), "layer.v1.tar+gzip"))
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": configuration_blob,
        "layers": descriptors,
    }
    manifest_blob = blob(json.dumps(manifest, sort_keys=True).encode(), "manifest.v1+json")
    manifest_blob["platform"] = {"architecture": architecture, "os": "linux"}
    # the first is the name that containerd gives it, the second the one by which other tools pick it from the layout
    manifest_blob["annotations"] = {
        "io.containerd.image.name": f"{name}:{tag}",
        "org.opencontainers.image.ref.name": tag,
    }
    index = {"schemaVersion": 2, "manifests": [manifest_blob]}
    archive = Files()
    archive.add("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
    archive.add("index.json", json.dumps(index, sort_keys=True).encode())
    for digest, content in blobs.items():
        archive.add(f"blobs/sha256/{digest}", content)
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    with open(out + ".new", "wb") as file:
        file.write(archive.tar())
    os.replace(out + ".new", out)
    return f"{name}:{tag}", [(len(plain), layer["size"]) for plain, layer in zip(tars, descriptors)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    image = commands.add_parser("image", help="write an image; prints its name, and the sizes on standard error")
    image.add_argument("--name", required=True, help="without a tag, such as localhost/joulecast/operator")
    image.add_argument("--tag", help="default: dev- and 12 digits of the image's digest")
    image.add_argument("--out", required=True, help="the tar file")
    image.add_argument("--bare", action="store_true", help="nothing but the programs, which must be static")
    image.add_argument("--directory", metavar="FROM=TO", help="files of a directory here, and where they come in the image")
    image.add_argument("--library", action="append", default=[], metavar="FILE", help="a library that a program opens by itself, or finds beside those; it comes to /usr/lib/joulecast")
    image.add_argument("programs", nargs="+", help="the first is the entry point; they come to /usr/bin")
    tree = commands.add_parser("tree", help="write the same files under a directory")
    tree.add_argument("--out", required=True, help="the directory")
    tree.add_argument("--library", action="append", default=[], metavar="FILE")
    tree.add_argument("programs", nargs="+")
    given = parser.parse_args()
    for program in given.programs + given.library:
        if not os.path.isfile(program):
            sys.exit(f"{program} is not there: build it first")
    if given.command == "tree":
        base_layer(given.programs, given.library).write(given.out)
        opened_layer(given.library).write(given.out)
        program_layer(given.programs).write(given.out)
        return
    layers = [program_layer(given.programs)]
    if given.bare:
        if dynamic := [program for program in given.programs if libraries(program)]:
            sys.exit(f"--bare: {dynamic[0]} is not static")
    else:
        layers.insert(0, base_layer(given.programs, given.library))
    parts = ["programs"] if given.bare else ["base", "programs"]
    if given.library:
        layers.insert(-1, opened_layer(given.library))
        parts.insert(-1, "libraries")
    if given.directory:
        source, separator, target = given.directory.partition("=")
        if not separator or not target.startswith("/"):
            sys.exit(f"--directory: FROM=TO with an absolute path TO, not {given.directory!r}")
        layers.append(directory_layer(source, target))
        parts.append("directory")
    entrypoint = f"/usr/bin/{os.path.basename(given.programs[0])}"
    name, sizes = write_image(layers, NONROOT, entrypoint, given.name, given.tag, given.out)
    for part, (plain, packed) in zip(parts, sizes if not given.bare else []):
        print(f"{given.name} {part}: {plain / 1e6:.1f} MB, {packed / 1e6:.1f} MB compressed", file=sys.stderr)
    print(name)


if __name__ == "__main__":
    main()
