//! The node's device nodes: all kinds for containers on the node's own kernel, block devices for those in
//! a guest, which has them as disks.

use crate::{container::spec::DeviceSpec, sandbox::SandboxError};
use a3s_box_api::shim::v1 as shim;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, Spec};
use std::{
    fs::{self, Metadata},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

const DEV: &str = "/dev";
/// Below /dev, what every container has of its own, and what udev keeps there.
const NOT_THE_NODES: [&str; 6] = ["console", "fd", "mqueue", "pts", "shm", ".udev"];

/// Character devices that are the same on every kernel: null, zero, full, random, urandom, tty, console,
/// ptmx.
pub const EVERYWHERE: [(i64, i64); 8] =
    [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2)];

/// The node at the host path, as far as a guest can have it: a block device, or one that it has itself.
pub fn for_a_guest(asked: &DeviceSpec) -> Result<LinuxDevice, SandboxError> {
    let field = format!("devices[{}].host_path", asked.container_path);
    let path = &asked.host_path;
    let data = fs::metadata(path)
        .map_err(|error| SandboxError::invalid(&field, format!("{path}: {error}")))?;
    let Some(device) = device(Path::new(&asked.container_path), &data) else {
        let why =
            format!("{path} is no device node, and folders of them do not reach into a guest");
        return Err(SandboxError::unsupported(field, why));
    };
    let (major, minor) = (device.major(), device.minor());
    if device.typ() == LinuxDeviceType::C && !EVERYWHERE.contains(&(major, minor)) {
        let why =
            format!("{path} is character device {major}:{minor}, which a guest does not have");
        return Err(SandboxError::unsupported(field, why));
    }
    Ok(device)
}

/// Those of the devices that the guest is to have as disks.
pub fn disks(asked: &[DeviceSpec], spec: &Spec) -> Vec<shim::HostDisk> {
    let nodes = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref());
    let is_disk = |asked: &&DeviceSpec| {
        nodes.into_iter().flatten().any(|node| {
            node.typ() == LinuxDeviceType::B && node.path() == Path::new(&asked.container_path)
        })
    };
    let disk = |asked: &DeviceSpec| shim::HostDisk {
        host_path: asked.host_path.clone(),
        container_path: asked.container_path.clone(),
        access: asked.permissions.clone(),
    };
    asked.iter().filter(is_disk).map(disk).collect()
}

/// The node at the host path, or all nodes below it, as the container is to see them.
pub fn asked_for(device: &DeviceSpec) -> Result<Vec<LinuxDevice>, SandboxError> {
    let mut found = Vec::new();
    let collected =
        collect(Path::new(&device.host_path), Path::new(&device.container_path), &mut found);
    let field = || format!("devices[{}].host_path", device.container_path);
    match collected {
        Err(error) => Err(SandboxError::invalid(field(), format!("{}: {error}", device.host_path))),
        Ok(()) if found.is_empty() => {
            let why = format!("{} is no device node and holds none", device.host_path);
            Err(SandboxError::invalid(field(), why))
        }
        Ok(()) => Ok(found),
    }
}

/// Every device node of the node.
pub fn all() -> Result<Vec<LinuxDevice>, SandboxError> {
    let failed = |error| SandboxError::step("list the node's devices", error);
    let mut found = Vec::new();
    for entry in fs::read_dir(DEV).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if NOT_THE_NODES.iter().all(|other| name != *other) {
            let path = Path::new(DEV).join(name);
            collect(&path, &path, &mut found).map_err(failed)?;
        }
    }
    Ok(found)
}

/// What goes away on the way counts as not there, but for the start. Links in folders are not followed.
fn collect(host: &Path, container: &Path, found: &mut Vec<LinuxDevice>) -> io::Result<()> {
    let data = fs::metadata(host)?;
    if !data.is_dir() {
        found.extend(device(container, &data));
        return Ok(());
    }
    for entry in fs::read_dir(host)? {
        let entry = entry?;
        if entry.file_type()?.is_symlink() {
            continue;
        }
        match collect(&entry.path(), &container.join(entry.file_name()), found) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result?,
        }
    }
    Ok(())
}

fn device(path: &Path, data: &Metadata) -> Option<LinuxDevice> {
    let kind = match data.file_type() {
        kind if kind.is_block_device() => LinuxDeviceType::B,
        kind if kind.is_char_device() => LinuxDeviceType::C,
        _ => return None,
    };
    let number = data.rdev();
    let mut device = LinuxDevice::default();
    device
        .set_path(path.to_owned())
        .set_typ(kind)
        .set_major(i64::from(rustix::fs::major(number)))
        .set_minor(i64::from(rustix::fs::minor(number)))
        .set_file_mode(Some(data.mode() & 0o7777))
        .set_uid(Some(data.uid()))
        .set_gid(Some(data.gid()));
    Some(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(host_path: &str, container_path: &str) -> DeviceSpec {
        DeviceSpec {
            host_path: host_path.into(),
            container_path: container_path.into(),
            permissions: "rw".into(),
        }
    }

    #[test]
    fn a_node_and_a_folder_of_nodes_are_found_and_anything_else_is_refused() {
        let found = asked_for(&wanted("/dev/null", "/dev/nothing")).unwrap();
        let [null] = &found[..] else { panic!("{found:?}") };
        assert_eq!(null.path(), Path::new("/dev/nothing"));
        assert_eq!((null.typ(), null.major(), null.minor()), (LinuxDeviceType::C, 1, 3));
        let found = asked_for(&wanted("/dev", "/host")).unwrap();
        assert!(found.iter().any(|device| device.path() == Path::new("/host/null")));
        for (host, why) in [("/etc/passwd", "no device"), ("/nowhere", "No such file")] {
            let error = asked_for(&wanted(host, "/dev/x")).unwrap_err().to_string();
            assert!(error.starts_with("devices[/dev/x]") && error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_guest_has_what_every_kernel_has_and_other_character_devices_are_refused_by_name() {
        let null = for_a_guest(&wanted("/dev/null", "/dev/nothing")).unwrap();
        assert_eq!((null.path().as_path(), null.major()), (Path::new("/dev/nothing"), 1));
        for (host, why) in [
            ("/dev/kmsg", "character device 1:11"),
            ("/dev", "folders of them"),
            ("/nowhere", "No such file"),
        ] {
            let error = for_a_guest(&wanted(host, "/dev/x")).unwrap_err().to_string();
            assert!(error.starts_with("devices[/dev/x]") && error.contains(why), "{error}");
        }
    }

    #[test]
    fn all_devices_are_the_nodes_without_those_a_container_has_itself() {
        let all = all().unwrap();
        let has = |path: &str| all.iter().any(|device| device.path() == Path::new(path));
        assert!(has("/dev/null") && !has("/dev/console") && !has("/dev/pts/ptmx"));
    }
}
