"""Checksums of an artifact's files, and the InferenceModel that names them."""

import hashlib
from pathlib import Path

SUMS = "SHA256SUMS"


def write_sums(directory):
    """Writes SHA256SUMS, as `sha256sum --check` reads it, and gives the digest of that file itself."""
    directory = Path(directory)
    lines = []
    for path in sorted(p for p in directory.iterdir() if p.is_file() and p.name != SUMS):
        with open(path, "rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    text = "".join(lines).encode()
    (directory / SUMS).write_bytes(text)
    return "sha256:" + hashlib.sha256(text).hexdigest()


def inference_model(name, parameters, claim, prefix, artifacts, accuracy):
    """The manifest as YAML; `artifacts` are (format, dtype, directory, bytes, checksum), `accuracy` (score, source) or None."""
    lines = [
        "apiVersion: joulecast.dev/v1alpha1", "kind: InferenceModel", "metadata:", f"  name: {name}", "spec:",
        f"  parameterCount: {parameters}",
    ]
    if accuracy is not None:
        lines += ["  accuracy:", f'    score: "{accuracy[0]}"', f'    source: "{accuracy[1]}"']
    lines.append("  artifacts:")
    for kind, dtype, directory, size, checksum in artifacts:
        lines += [
            f"    - format: {kind} # {size / 1e6:.1f} MB", f"      dtype: {dtype}", f"      checksum: {checksum}",
            "      source:", "        persistentVolumeClaim:", f"          claimName: {claim}",
            f"          path: {prefix + '/' if prefix else ''}{directory}",
        ]
    return "\n".join(lines) + "\n"
