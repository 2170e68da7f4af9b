//! What the guest mounts in a volume, on the host.

use crate::files::mount_tmpfs;
use crate::fixture::{Pod, Process, process, refusal};
use crate::tests;
use a3s_box_volume::{Access, Place, Propagation};
use anyhow::{Context, Result, ensure};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MountPropagationFlags, UnmountFlags};
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;

tests![
    a_mount_of_the_guest_is_the_hosts_too_and_stays_the_guests,
    nothing_is_mounted_where_a_link_leads_or_another_folder_is,
    what_the_guest_says_of_devices_and_powers_counts_for_nothing,
    a_mount_whose_guest_has_gone_fails_and_goes,
];

const VOLUME: &str = "volumes/c/0";

/// A volume whose mounts go both ways.
struct Both {
    pod: Pod,
    /// On the host, and in the guest.
    host: PathBuf,
    guest: PathBuf,
    place: Place,
    namespace: OwnedFd,
}

impl Both {
    fn start() -> Result<Self> {
        let pod = Pod::start()?;
        let host = pod.host.join("outer");
        fs::create_dir(&host)?;
        mount_tmpfs(&host)?;
        rustix::mount::mount_change(&host, MountPropagationFlags::SHARED)?;
        pod.share.add(VOLUME, &host, Access::ReadWrite, Propagation::HostToContainer)?;
        let guest = pod.guest.join(VOLUME);
        let place = Place::at(&host)?.context("a folder")?;
        let namespace = File::open("/proc/self/ns/mnt")?.into();
        Ok(Self { pod, host, guest, place, namespace })
    }

    /// Mounts something in the guest.
    fn mount(&self, name: &str) -> Result<PathBuf> {
        let point = self.guest.join(name);
        fs::create_dir(&point)?;
        mount_tmpfs(&point)?;
        Ok(point)
    }

    fn attach(&self, name: &str) -> a3s_box_volume::Result<OwnedFd> {
        let (host, below) = (self.namespace.as_fd(), Path::new(name));
        a3s_box_volume::attach(host, &self.place, below, "test/1", MountAttrFlags::empty())
    }

    /// Shows it on the host, as the shim does, with a server for the guest's end.
    fn show(&self, name: &str, point: &Path) -> Result<Process> {
        self.pod.orders.hold(&Path::new(VOLUME).join(name))?;
        let requests = self.attach(name)?;
        rustix::fs::fcntl_setfl(&requests, OFlags::empty())?;
        let (ours, theirs) = UnixStream::pair()?;
        let point = point.to_str().context("path")?;
        let server = process(&["mount-server", point], theirs.into(), Stdio::inherit())?;
        std::thread::spawn(move || {
            a3s_box_volume::pump(requests, OwnedFd::from(ours).into(), Path::new("/"))
        });
        Ok(server)
    }

    fn detach(&self) -> Result<()> {
        Ok(a3s_box_volume::detach(self.namespace.as_fd(), "test/1")?)
    }
}

impl Drop for Both {
    fn drop(&mut self) {
        // The pod's folders are removed next.
        self.detach().ok();
        rustix::mount::unmount(self.guest.join("d"), UnmountFlags::DETACH).ok();
    }
}

fn a_mount_of_the_guest_is_the_hosts_too_and_stays_the_guests() -> Result<()> {
    let both = Both::start()?;
    let inside = both.mount("d")?;
    fs::write(inside.join("from-guest"), "one")?;
    let _server = both.show("d", &inside)?;
    let outside = both.host.join("d");
    ensure!(fs::read(outside.join("from-guest"))? == b"one");
    fs::create_dir(outside.join("sub"))?;
    fs::write(outside.join("sub/from-host"), vec![7; 3 << 20])?;
    // Each walk to it asks the host for the name of the mount point.
    for _ in 0..20 {
        ensure!(fs::read(inside.join("sub/from-host"))? == vec![7; 3 << 20]);
        ensure!(fs::metadata(&inside)?.dev() != fs::metadata(&both.guest)?.dev(), "unmounted");
    }
    let listed: Vec<_> = fs::read_dir(&both.guest)?.collect::<std::io::Result<_>>()?;
    ensure!(listed.len() == 1, "{listed:?}");
    both.detach()?;
    both.pod.orders.release(&Path::new(VOLUME).join("d"))?;
    ensure!(fs::read_dir(&outside)?.next().is_none(), "unmounted on the host");
    ensure!(inside.join("sub/from-host").exists(), "and still the guest's");
    Ok(())
}

fn nothing_is_mounted_where_a_link_leads_or_another_folder_is() -> Result<()> {
    let both = Both::start()?;
    let aim = both.pod.host.join("aim");
    fs::create_dir_all(aim.join("below"))?;
    symlink(&aim, both.host.join("link"))?;
    fs::write(both.host.join("file"), "")?;
    for bad in ["link", "link/below", "..", "../aim", "/tmp", "file", "absent"] {
        let error = both.attach(bad).map(drop).expect_err(bad);
        ensure!(matches!(error, a3s_box_volume::Error::Mount { .. }), "{bad}: {error}");
    }
    rustix::mount::unmount(&both.host, UnmountFlags::DETACH)?;
    let error = both.attach("").map(drop).expect_err("another folder");
    let cause = std::error::Error::source(&error).context("cause")?.to_string();
    ensure!(cause.contains("another folder"), "{cause}");
    Ok(())
}

fn what_the_guest_says_of_devices_and_powers_counts_for_nothing() -> Result<()> {
    let both = Both::start()?;
    let inside = both.mount("d")?;
    fs::copy("/bin/true", inside.join("powerful"))?;
    fs::set_permissions(inside.join("powerful"), fs::Permissions::from_mode(0o4755))?;
    let kind = rustix::fs::FileType::CharacterDevice;
    let (mode, null) = (rustix::fs::Mode::from_raw_mode(0o666), rustix::fs::makedev(1, 3));
    rustix::fs::mknodat(rustix::fs::CWD, inside.join("null"), kind, mode, null)?;
    let _server = both.show("d", &inside)?;
    let outside = both.host.join("d");
    let opened = File::options().write(true).open(outside.join("null"));
    ensure!(refusal(opened) == Some(Errno::ACCESS));
    let flags = rustix::fs::statvfs(&outside)?.f_flag;
    ensure!(flags.contains(rustix::fs::StatVfsMountFlags::NOSUID), "{flags:?}");
    Ok(())
}

fn a_mount_whose_guest_has_gone_fails_and_goes() -> Result<()> {
    let both = Both::start()?;
    fs::create_dir(both.host.join("d"))?;
    let requests = both.attach("d")?;
    let asked = both.host.join("d/f");
    let waiting = std::thread::spawn(move || fs::metadata(asked).is_err());
    drop(requests);
    ensure!(waiting.join().is_ok_and(|failed| failed));
    ensure!(fs::metadata(both.host.join("d/f")).is_err());
    both.detach()?;
    ensure!(refusal(fs::metadata(both.host.join("d/f"))) == Some(Errno::NOENT));
    Ok(())
}
