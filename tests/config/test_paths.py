"""Which of the host's paths a pocket may be given."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocketd.paths import Mount, parse_mount, refuse_directory


@pytest.mark.parametrize(
    "path",
    """/ /usr /usr/share/doc /usr/local/bin /bin /sbin /lib /lib64 /lib/x86_64-linux-gnu /libx32 /etc /etc/ssl /proc
    /proc/1/root /sys /dev /dev/shm /boot /run /run/user /run/user/1000 /run/pocketd /var /var/lib /var/log /var/log/x
    /home /srv /opt /tmp /var/tmp /mnt""".split(),
)
def test_system_and_shared_directories_are_refused(path):
    assert refuse_directory(path)
    assert refuse_directory(Path(path))


@pytest.mark.parametrize(
    "path",
    """/srv/detect /home/alice /home/alice/app /root /root/app /opt/app /tmp/x /var/tmp/x /var/lib/x /var/lib/x/y
    /var/www /run/user/1000/x /data /app /projects/x /usrlocal /mnt/disk""".split(),
)
def test_directories_of_users_and_services_are_not(path):
    assert refuse_directory(path) is None


@pytest.mark.parametrize("path", ["srv", "", "/srv/../etc", "/srv/./x", "//etc", "/srv//x", "/srv/x/"])
def test_a_path_that_is_not_resolved_is_refused(path):
    assert "absolute path" in (refuse_directory(path) or "")


@pytest.mark.parametrize(
    ("text", "mount"),
    [
        ("/srv/data", Mount(Path("/srv/data"), Path("/srv/data"), False)),
        ("/srv/data:/data", Mount(Path("/srv/data"), Path("/data"), False)),
        ("/srv/data:rw", Mount(Path("/srv/data"), Path("/srv/data"), True)),
        ("/srv/data:/data:rw", Mount(Path("/srv/data"), Path("/data"), True)),
        ("/usr/share/dict", Mount(Path("/usr/share/dict"), Path("/usr/share/dict"), False)),
    ],
)
def test_a_mount_reads_as_src_dst_rw(text, mount):
    assert parse_mount(text) == mount


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not an absolute path"),
        ("data", "not an absolute path"),
        ("/srv/data:data", "not an absolute path"),
        ("/srv/../etc", "not an absolute path"),
        ("/srv/data:/../x", "not an absolute path"),
        ("/srv/data:", "not an absolute path"),
        ("/srv/data:/data:ro", "leave it out"),
        ("/srv/data:/data:rx", "too many parts"),
        ("/a:/b:/c:rw", "too many parts"),
        ("/:/host", "cannot be mounted"),
        ("/srv:/", "cannot be mounted"),
        ("/proc/1", "cannot be mounted"),
        ("/srv/x:/dev/shm", "cannot be mounted"),
        ("/sys:/data", "cannot be mounted"),
        ("/srv/x:/run/pocketd", "cannot be mounted"),
        ("/srv/x:/run/pocketd/empty", "cannot be mounted"),
        ("/srv/x:/run", "would cover '/run'"),
        ("/usr/share:/data:rw", "would let the pocket write"),
        ("/srv:rw", "would let the pocket write"),
    ],
)
def test_a_bad_mount_is_refused_with_what_would_be_right(text, said):
    with pytest.raises(ValueError) as refused:
        parse_mount(text)
    assert said in str(refused.value)
