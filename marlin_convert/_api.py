"""The functions that `marlin_convert` offers; each stands for a command. None prints, and none ends the process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .options import DEFAULT_SHARD_SIZE, Format, HubAccess, Options, PublishTarget, QuantMethod, ZeroPointReading
from .progress import ProgressEvent, progress_for

if TYPE_CHECKING:
    from .conversion.plan import Plan
    from .conversion.proof import Proof
    from .conversion.report import Report
    from .conversion.restore import Restored
    from .conversion.verify import Verification


def convert(
    source: str | Path,
    out: str | Path,
    *,
    format: Format | str = Format.AUTO,
    zero_points: ZeroPointReading | str | None = None,
    verify: bool = False,
    force: bool = False,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    quant_method: QuantMethod | str = QuantMethod.GPTQ,
    device: str = "auto",
    low_disk: bool = False,
    push_to: PublishTarget | str | None = None,
    attest: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Callable[[ProgressEvent], object] | None = None,
) -> Report:
    """Convert a GPTQ, AWQ or compressed-tensors checkpoint into a Marlin one. `out` appears complete or not at all.

    Args:
        source: A folder, or an id on the Hugging Face Hub.
        out: The folder to create.
        format: "auto" (the original format where every layer fits it, else the extended one), "marlin" or
            "marlin_ext".
        zero_points: "nibble" or "word": how to read an asymmetric source in which a zero point is 0, if nothing tells
            who wrote it.
        verify: Read the result back from disk and check it against the source, layer by layer.
        force: Replace an earlier result at `out`, or other weights on the Hub.
        max_shard_size: Largest weight file: bytes, or a text such as "5GB".
        quant_method: What the result's config names: "gptq" for vLLM ≤ 0.10.0 and AutoGPTQ, "marlin" for TGI.
        device: "auto", "cpu", "cuda" or "cuda:N".
        low_disk: Remove each downloaded weight file from the cache as soon as it is converted.
        push_to: Where to publish the result: a repository's id, or a PublishTarget that says how; an empty id is named
            after the source.
        attest: Where to write an in-toto statement: the SHA-256 of every file of the result and of its source.
        revision: Branch, tag or commit of a Hub source.
        token: Hub token; by default the one that is logged in.
        cache_dir: Hub cache to use instead of the standard one.
        progress: Called with a ProgressEvent at each step, from one thread at a time; what it raises stops the work.
            Without it, a notebook shows bars.

    Returns:
        What was done: the plan, the files written, the time, and with `verify` the Verification.

    Raises:
        AlreadyMarlin: The source is a Marlin checkpoint: there is nothing to do.
        OptionError: An argument has a value that it may not have.
        SourceError: The source is missing, damaged, or not a checkpoint.
        UnsupportedError: The source is sound and cannot be converted; the message names every layer and why.
        DeviceError: The device is missing, or too old.
        OutputError: `out` cannot be written.
        VerificationError: The result differs from its source; nothing is kept.
        HubError: The Hub did not give or take what was asked for.
    """
    from .conversion.convert import convert as work

    target = PublishTarget(push_to) if isinstance(push_to, str) else push_to
    options = Options(
        device=device, format=Format.chosen(format, "format"),
        zero_points=None if zero_points is None else ZeroPointReading.chosen(zero_points, "zero_points"),
        verify=verify, force=force, max_shard_size=max_shard_size,
        quant_method=QuantMethod.chosen(quant_method, "quant_method"), low_disk=low_disk, target=target,
        attest=None if attest is None else Path(attest),
    )  # fmt: skip
    return work(source, out, options, progress_for(progress), access=_access(revision, token, cache_dir))


def plan(
    source: str | Path,
    *,
    format: Format | str = Format.AUTO,
    zero_points: ZeroPointReading | str | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Callable[[ProgressEvent], object] | None = None,
) -> Plan:
    """Plan a conversion without reading a weight; of a Hub source, headers and small tensors travel.

    Args:
        source: A folder, or an id on the Hugging Face Hub.
        format: As for `convert`.
        zero_points: As for `convert`.
        max_shard_size: As for `convert`.
        revision: Branch, tag or commit of a Hub source.
        token: Hub token; by default the one that is logged in.
        cache_dir: Hub cache to use instead of the standard one.
        progress: As for `convert`.

    Returns:
        What `convert` would do: the result's format, the layers, and in `refusals` why layers cannot be converted
        (`require_convertible` raises that).

    Raises:
        OptionError: An argument has a value that it may not have.
        SourceError: The source is missing, damaged, or not a checkpoint.
        UnsupportedError: The source is in none of these formats, or Marlin cannot hold it.
        HubError: The Hub did not give what was asked for.
    """
    from .conversion.convert import plan_only

    options = Options(
        format=Format.chosen(format, "format"),
        zero_points=None if zero_points is None else ZeroPointReading.chosen(zero_points, "zero_points"),
        max_shard_size=max_shard_size,
    )
    return plan_only(source, options, progress_for(progress), access=_access(revision, token, cache_dir))[1]


def verify(
    source: str | Path,
    out: str | Path,
    *,
    zero_points: ZeroPointReading | str | None = None,
    device: str = "auto",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Callable[[ProgressEvent], object] | None = None,
) -> Verification:
    """Check a Marlin checkpoint against the checkpoint that it was made from; writes `verify.json` into `out`.

    Args:
        source: That checkpoint: a folder, or an id on the Hugging Face Hub.
        out: The folder of the Marlin checkpoint.
        zero_points: How the source's zero points are read, as for `convert`; by default as the result's report says.
        device: Where to multiply: "auto", "cpu", "cuda" or "cuda:N".
        revision: Branch, tag or commit of a Hub source.
        token: Hub token; by default the one that is logged in.
        cache_dir: Hub cache to use instead of the standard one.
        progress: As for `convert`.

    Returns:
        Each layer's result; `ok` tells whether all are equal. A difference is reported, not raised: `require_ok` raises
        VerificationError.

    Raises:
        SourceError: One of the two is missing, damaged, or not a checkpoint.
        UnsupportedError: `source` is no checkpoint that Marlin can hold.
        DeviceError: The device is missing, or too old.
        OutputError: `verify.json` cannot be written.
        HubError: The Hub did not give what was asked for.
    """
    from .conversion.pair import verify_pair

    access = _access(revision, token, cache_dir)
    return verify_pair(source, out, device, progress_for(progress), access=access, zero_points=zero_points)


def prove(
    result: str | Path,
    *,
    attest: str | Path | None = None,
    device: str = "auto",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Callable[[ProgressEvent], object] | None = None,
) -> Proof:
    """Compare a result of marlin-convert with what its own source, which it names, gives when it is converted again.

    Both are read from the Hub in parts; nothing is kept, and neither is changed.

    Args:
        result: A folder that `convert` made of a Hub source, or an id on the Hugging Face Hub where it was published.
        attest: Where to write an in-toto statement, if everything is equal.
        device: Where to multiply: "auto", "cpu", "cuda" or "cuda:N".
        revision: Branch, tag or commit of a result on the Hub.
        token: Hub token; by default the one that is logged in.
        cache_dir: Hub cache to use instead of the standard one, for the small files.
        progress: As for `convert`.

    Returns:
        What was compared, and in `problems` what differs, by file or layer; `require_ok` raises VerificationError.

    Raises:
        SourceError: The result does not say what it was made from, or it was made from a folder.
        UnsupportedError: What it names is no checkpoint that Marlin can hold.
        DeviceError: The device is missing, or too old.
        OutputError: The statement cannot be written.
        HubError: The Hub did not give what was asked for.
    """
    from .conversion.proof import prove as work

    statement = None if attest is None else Path(attest)
    return work(result, device, progress_for(progress), attest=statement, access=_access(revision, token, cache_dir))


def restore(
    marlin: str | Path,
    out: str | Path,
    *,
    original: bool = False,
    v2: bool = False,
    force: bool = False,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    progress: Callable[[ProgressEvent], object] | None = None,
) -> Restored:
    """Write the checkpoint that a Marlin one was made from, bit for bit. `out` appears complete or not at all.

    Args:
        marlin: A Marlin checkpoint of either format, whoever made it: a folder, or an id on the Hugging Face Hub.
        out: The folder to create.
        original: Write it in its own format, whatever that was; else in GPTQ.
        v2: In GPTQ, store zero points as they are (checkpoint_format gptq_v2), not less one (gptq).
        force: Replace an earlier result at `out`.
        max_shard_size: Largest weight file: bytes, or a text such as "5GB".
        revision: Branch, tag or commit of a Hub checkpoint.
        token: Hub token; by default the one that is logged in.
        cache_dir: Hub cache to use instead of the standard one.
        progress: As for `convert`.

    Returns:
        What was done: the layers, the files written, and whether the source's own settings were known.

    Raises:
        OptionError: An argument has a value that it may not have.
        SourceError: The checkpoint is missing or damaged.
        UnsupportedError: It is no Marlin checkpoint, or nothing tells what it was made from.
        OutputError: `out` cannot be written.
        HubError: The Hub did not give what was asked for.
    """
    from .conversion.restore import restore as work

    return work(
        marlin, out, progress_for(progress), original=original, force=force, max_shard_size=max_shard_size, v2=v2,
        access=_access(revision, token, cache_dir),
    )  # fmt: skip


def push(
    out: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    branch: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    force: bool = False,
    token: str | None = None,
) -> str:
    """Publish a finished result on the Hugging Face Hub, in one commit; the repository is created when missing.

    Args:
        out: A folder that `convert` made.
        repo_id: The repository; without an owner, one of your own.
        private: Create the repository as a private one.
        branch: Branch to commit to, created when missing.
        create_pr: Open a pull request instead of committing.
        commit_message: Title of the commit.
        force: Overwrite other weights that the repository holds.
        token: Hub token that may write; by default the one that is logged in.

    Returns:
        The address of the commit or the pull request.

    Raises:
        SourceError: `out` is not a finished result.
        HubError: The Hub does not take it; the repository is as it was.
    """
    from .conversion.publish import push_result

    target = PublishTarget(repo_id, private, branch, create_pr, commit_message)
    return push_result(Path(out), target, force=force, token=token)


def _access(revision: str | None, token: str | None, cache_dir: str | Path | None) -> HubAccess:
    return HubAccess(revision, token, None if cache_dir is None else Path(cache_dir))
