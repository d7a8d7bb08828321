"""A disk whose power can be cut: ext4 on a loop file, shut down without flushing its journal."""

import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path

EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2


def unavailable():
    """Why power cuts cannot be made here, or None."""
    if os.geteuid() != 0:
        return "power cuts need root (loop mounts and EXT4_IOC_SHUTDOWN)"
    for tool in ("mkfs.ext4", "mount", "losetup"):
        if shutil.which(tool) is None and not Path(f"/usr/sbin/{tool}").exists():
            return f"power cuts need {tool}"
    if subprocess.run(["losetup", "-f"], capture_output=True).returncode != 0:
        return "power cuts need a loop device"
    return None


class Disk:
    """The file system; `cut()` loses everything that was not synced, `restore()` brings the rest back."""

    def __init__(self, folder, megabytes=1024):
        self.image = Path(folder) / "disk.img"
        self.mount_point = Path(folder) / "disk"
        self.mount_point.mkdir()
        with open(self.image, "wb") as image:
            image.truncate(megabytes << 20)
        run("mkfs.ext4", "-q", "-F", str(self.image))
        self.mounted = False
        self.restore()

    def restore(self):
        # A commit interval far beyond the test: nothing reaches the disk but by a sync.
        run("mount", "-o", "loop,commit=600", str(self.image), str(self.mount_point))
        self.mounted = True

    def cut(self):
        folder = os.open(self.mount_point, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(folder)

    def unmount(self):
        if self.mounted:
            run("umount", str(self.mount_point))
            self.mounted = False


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
