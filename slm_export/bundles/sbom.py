"""``sbom.cdx.json``: what a bundle is made of, in CycloneDX 1.6.

The same bundle gives the same bytes: no time stamp, and a serial number derived from the content.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from slm_export.bundles.checksums import FileEntry, sha256_entries
from slm_export.results import ModelFacts, Report

if TYPE_CHECKING:
    from cyclonedx.model import ExternalReference, HashType
    from cyclonedx.model.component import Component
    from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression

SBOM = "sbom.cdx.json"


def sbom_text(report: Report, files: Sequence[FileEntry]) -> str:
    """Return the CycloneDX document of a bundle that consists of ``files``."""
    from cyclonedx.model.bom import Bom
    from cyclonedx.output.json import JsonV1Dot6

    bom = Bom(serial_number=_serial(report.model.source_sha256, files, report.toolchain))
    # The library fills in the present time; the format allows none, and its writer then leaves it out.
    bom.metadata.timestamp = None  # type: ignore[assignment]
    bundle, model = _bundle(report, files), _model(report.model, files)
    formats = {result.artifact.path.as_posix(): result.artifact.format for result in report.formats}
    parts = [_file(entry, formats) for entry in files]
    tools = [_package(name, version) for name, version in sorted(report.toolchain.items())]
    bom.metadata.component = bundle
    for component in (model, *parts, *tools):
        bom.components.add(component)
    bom.register_dependency(bundle, [model, *parts, *tools])
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def write_sbom(folder: Path, report: Report, files: Sequence[FileEntry]) -> Path:
    """Write ``sbom.cdx.json`` into a bundle."""
    path = folder / SBOM
    path.write_text(sbom_text(report, files), encoding="utf-8", newline="\n")
    return path


def update_sbom(folder: Path, files: Sequence[FileEntry]) -> Path:
    """Write the document of a bundle anew whose files are others now; what else it says stays.

    Given   files: all of the bundle, but the document and the manifest
    """
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import ComponentType
    from cyclonedx.output.json import JsonV1Dot6

    path = folder / SBOM
    bom: Any = Bom.from_json(json.loads(path.read_text(encoding="utf-8")))  # type: ignore[attr-defined]
    bom.metadata.timestamp = None
    listed = [each for each in bom.components if each.type == ComponentType.FILE]
    formats = {
        each.name: said.value
        for each in listed
        for said in each.properties
        if said.name == "slm-export:format"
    }
    others = [each for each in bom.components if each.type != ComponentType.FILE]
    (model,) = (each for each in others if each.bom_ref.value == "model")
    tools = {each.name: each.version for each in others if each is not model}
    bom.serial_number = _serial(next(iter(model.hashes)).content, files, tools)
    bundle = bom.metadata.component
    bundle.hashes = [_sha256(sha256_entries(files))]
    parts = [_file(entry, formats) for entry in files]
    bom.components, bom.dependencies = [*others, *parts], []
    bom.register_dependency(bundle, [*others, *parts])
    path.write_text(JsonV1Dot6(bom).output_as_string(indent=2) + "\n", encoding="utf-8", newline="\n")
    return path


def _serial(source_sha256: str, files: Sequence[FileEntry], toolchain: Mapping[str, str]) -> uuid.UUID:
    content = f"{source_sha256} {sha256_entries(files)} {sorted(toolchain.items())}"
    return uuid.uuid5(uuid.NAMESPACE_OID, content)


def _bundle(report: Report, files: Sequence[FileEntry]) -> Component:
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        type=ComponentType.DATA,
        name=f"{report.model.name} for {report.device}",
        description=f"Model bundle for {report.device_title} ({report.target})",
        bom_ref="bundle",
        hashes=[_sha256(sha256_entries(files))],
    )


def _model(model: ModelFacts, files: Sequence[FileEntry]) -> Component:
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component, ComponentType

    facts = {
        "architecture": model.architecture,
        "task": model.task,
        "parameters": str(model.parameters),
        "source_bytes": str(model.source_bytes),
    }
    return Component(
        type=ComponentType.MACHINE_LEARNING_MODEL,
        name=model.name,
        bom_ref="model",
        hashes=[_sha256(model.source_sha256)],
        licenses=_licences(model.licence),
        external_references=_texts(model.licence_texts, files),
        properties=[Property(name=f"slm-export:{key}", value=value) for key, value in facts.items()],
    )


def _file(entry: FileEntry, formats: dict[str, str]) -> Component:
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component, ComponentType

    # A package folder (Core ML) is listed file by file; each belongs to the artifact above it.
    owner = next((path for path in formats if f"{entry.path}/".startswith(f"{path}/")), None)
    properties = [Property(name="slm-export:bytes", value=str(entry.bytes))]
    if owner is not None:
        properties.append(Property(name="slm-export:format", value=formats[owner]))
    return Component(
        type=ComponentType.FILE,
        name=entry.path,
        bom_ref=f"file:{entry.path}",
        hashes=[_sha256(entry.sha256)],
        properties=properties,
    )


def _package(name: str, version: str) -> Component:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    # The interpreter is no package of the index.
    kind = "generic" if name.lower() in ("python", "cpython") else "pypi"
    return Component(
        type=ComponentType.LIBRARY,
        name=name,
        version=version,
        bom_ref=f"package:{name}@{version}",
        purl=PackageURL(type=kind, name=name, version=version),
    )


def _licences(licence: str | None) -> list[DisjunctiveLicense | LicenseExpression]:
    """A hub's licence tag is often no SPDX id ("llama3.2"): then it is a name. Unknown stays absent."""
    from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression
    from cyclonedx.spdx import fixup_id, is_expression

    if not licence:
        return []
    if known := fixup_id(licence):
        return [DisjunctiveLicense(id=known)]
    if is_expression(licence):
        return [LicenseExpression(licence)]
    return [DisjunctiveLicense(name=licence)]


def _texts(paths: Sequence[str], files: Sequence[FileEntry]) -> list[ExternalReference]:
    """Return where the licence's texts are: files of the bundle."""
    from cyclonedx.model import ExternalReference, ExternalReferenceType, XsUri

    hashes = {entry.path: entry.sha256 for entry in files}
    return [
        ExternalReference(
            type=ExternalReferenceType.LICENSE, url=XsUri(quote(path)), hashes=[_sha256(hashes[path])]
        )
        for path in paths
    ]


def _sha256(value: str) -> HashType:
    from cyclonedx.model import HashAlgorithm, HashType

    return HashType(alg=HashAlgorithm.SHA_256, content=value)
