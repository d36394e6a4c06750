"""standbyctl demo: the main job from end to end on this machine, each step shown, the result proved bit for bit."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import format_size
from ..errors import Refused
from .command import Command, Invocation, asynchronous, pass_invocation
from .command import size as size_type
from .demo_image import find_tool
from .local_cluster import LocalCluster
from .output import Output

if TYPE_CHECKING:
    from .demo_story import Story

_MIB = 1024 * 1024
SIZE_MIN = 64 * _MIB
# The image, volume, mirror, preserved blocks, repository and restored image.
_SPACE_FACTOR = 6


@click.command(cls=Command)
@click.option(
    "--dir", "directory", type=click.Path(file_okay=False, path_type=Path), help="Work here. [default: a new one]"
)
@click.option(
    "--size", type=size_type, default="256MiB", show_default=True, help="Of the volume; whole MiB, from 64MiB."
)
@click.option("--keep", is_flag=True, help="Leave the nodes running and the files in place.")
@pass_invocation
@asynchronous
async def demo(invocation: Invocation, directory: Path | None, size: int, keep: bool) -> None:
    """Show the main job end to end, and prove it.

    It starts three nodes on loopback, puts an ext4 filesystem with real files of this machine on a volume, keeps
    writing to it, takes a snapshot, damages the volume, backs the snapshot up, restores it, and proves that the
    restored image is what the volume held at that instant. Nothing outside its directory is touched.

    \b
    Example: standbyctl demo
             standbyctl demo --dir /tmp/demo --size 1GiB --keep
    """
    # Only here: every other command does without the NBD client, and starts sooner.
    from .demo_story import Narrator, Story

    if size < SIZE_MIN or size % _MIB:
        raise click.BadParameter(
            f"the demonstration takes whole MiB from {format_size(SIZE_MIN)} on", param_hint="--size"
        )
    for tool in ("mke2fs", "e2fsck", "debugfs"):
        find_tool(tool)
    output = invocation.output
    work, is_new = _work_directory(directory)
    cluster = LocalCluster(work / "cluster")
    failed = False
    try:
        _check_space(work, size)
        output.remark(f"Stillpoint demo: a volume of {format_size(size)} and three nodes on this machine, in {work}\n")
        story = Story(work, size, cluster, Narrator(output, step_count=8))
        await story.tell()
        failed = bool(story.failures)
        _show(output, story)
    except Exception:
        failed = True
        raise
    finally:
        # Also after Ctrl-C, which is no failure that anybody would want to look into.
        if keep:
            _say_how_to_go_on(output, cluster)
        else:
            _clean_up(output, cluster, work, is_new=is_new, failed=failed)
    if failed:
        click.get_current_context().exit(1)


def _work_directory(directory: Path | None) -> tuple[Path, bool]:
    """The directory, and whether it is ours to remove."""
    if directory is None:
        return Path(tempfile.mkdtemp(prefix="stillpoint-demo-")), True
    directory = directory.absolute()
    if directory.exists() and any(directory.iterdir()):
        raise Refused(f"{directory} is not empty; name a new directory")
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    return directory, is_new


def _check_space(work: Path, size: int) -> None:
    free = shutil.disk_usage(work).free
    if free < size * _SPACE_FACTOR:
        raise Refused(
            f"{work} has {format_size(free)} free and a demo of {format_size(size)} needs up to "
            f"{format_size(size * _SPACE_FACTOR)}; choose a smaller --size or another --dir"
        )


def _show(output: Output, story: Story) -> None:
    passed = not story.failures
    output.remark("")
    if output.as_json:
        document: dict[str, Any] = {"passed": passed, "failures": story.failures, **story.facts.document()}
        output.document(document)
        return
    output.table(("RESULT", "VALUE>"), story.facts.rows())
    output.line()
    for failure in story.failures:
        output.alarm(failure)
    output.line("PASSED" if passed else f"FAILED: {story.failures[0]}")


def _say_how_to_go_on(output: Output, cluster: LocalCluster) -> None:
    if cluster.exists:
        output.remark(f"\nThe nodes run on. To look around:  export STILLPOINT_CLUSTER={cluster.cluster_file}")
        output.remark(f"To stop them:  standbyctl local down --dir {cluster.directory}")


def _clean_up(output: Output, cluster: LocalCluster, work: Path, *, is_new: bool, failed: bool) -> None:
    if cluster.exists:
        cluster.down()
        if failed:
            output.remark(f"what it wrote is left in {work}, with the nodes' logs in {cluster.directory / 'logs'}")
            return
    for entry in work.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    if is_new:
        work.rmdir()
