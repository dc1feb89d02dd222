"""Checksums of an artifact's files, their digest as the runtime computes it, and the InferenceModel that names them."""

import hashlib
from pathlib import Path

SUMS = "SHA256SUMS"


# As runtime-pod/src/artifact_digest.rs has them.
ENDINGS = {"json", "safetensors", "gguf", "onnx", "onnx_data", "data", "bin", "xml", "pt", "pth", "model", "txt"}
WHOLE_BYTES, END_BYTES = 16 << 20, 4 << 20


def write_sums(directory):
    """Writes SHA256SUMS, as `sha256sum --check` reads it."""
    lines = []
    for path in sorted(p for p in Path(directory).iterdir() if p.is_file() and p.name != SUMS):
        with open(path, "rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    (Path(directory) / SUMS).write_text("".join(lines))


def digest(directory):
    """What a run reports as artifactDigest: of large files both ends and the length count."""
    total = hashlib.sha256()
    for path in sorted(p for p in Path(directory).iterdir() if p.suffix[1:] in ENDINGS and not p.name.startswith(".")):
        size = path.stat().st_size
        with open(path, "rb") as file:
            if size <= WHOLE_BYTES:
                content = file.read()
            else:
                content = file.read(END_BYTES)
                file.seek(-END_BYTES, 2)
                content += file.read(END_BYTES)
        total.update(f"{path.name}\0{size}\0{hashlib.sha256(content).hexdigest()}\n".encode())
    return "files-sha256:" + total.hexdigest()


def inference_model(name, parameters, claim, prefix, artifacts, accuracy):
    """The manifest as YAML; `artifacts` are (format, dtype, directory, bytes, digest, accuracy), `accuracy` (score, source) or None."""
    lines = [
        "apiVersion: joulecast.dev/v1alpha1", "kind: InferenceModel", "metadata:", f"  name: {name}", "spec:",
        f"  parameterCount: {parameters}",
    ]
    if accuracy is not None:
        lines += ["  accuracy:", f'    score: "{accuracy[0]}"', f'    source: "{accuracy[1]}"']
    lines.append("  artifacts:")
    for kind, dtype, directory, size, digest, own in artifacts:
        lines += [f"    - format: {kind} # {size / 1e6:.1f} MB", f"      dtype: {dtype}"]
        if own is not None:
            lines += ["      accuracy:", f'        score: "{own[0]}"', f'        source: "{own[1]}"']
        lines += [
            f"      digest: {digest}",
            "      source:", "        persistentVolumeClaim:", f"          claimName: {claim}",
            f"          path: {prefix + '/' if prefix else ''}{directory}",
        ]
    return "\n".join(lines) + "\n"
