//! Block devices of the node in the pod's machine: plugged in for the first container that asks for one,
//! unplugged with the last.

use a3s_box_api::{
    agent::v1::{self as agent, agent_client::AgentClient},
    shim::v1 as shim,
};
use a3s_box_vmm::{DiskAccess, Hardware};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, Spec};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    os::{
        fd::AsFd,
        unix::fs::{FileTypeExt, MetadataExt},
    },
};
use tokio::sync::Mutex;
use tonic::{Status, transport::Channel};

/// As many as a pod may have.
const MOST: u8 = 64;

/// The machine's disks by target.
#[derive(Debug, Default)]
pub struct Disks(Mutex<BTreeMap<u8, Disk>>);

#[derive(Debug)]
struct Disk {
    /// The node's number.
    device: u64,
    access: DiskAccess,
    /// The guest's numbers.
    numbers: (i64, i64),
    users: BTreeSet<String>,
}

impl Disks {
    /// Plugs in what the container asks for, and puts the guest's numbers into its spec.
    pub async fn add(
        &self,
        hardware: &Hardware,
        agent: &mut AgentClient<Channel>,
        container: &str,
        disks: &[shim::HostDisk],
        spec: &mut Spec,
    ) -> Result<(), Status> {
        for wanted in disks {
            let numbers = self.plug(hardware, agent, container, wanted).await?;
            write_into(spec, wanted, numbers)?;
        }
        Ok(())
    }

    async fn plug(
        &self,
        hardware: &Hardware,
        agent: &mut AgentClient<Channel>,
        container: &str,
        wanted: &shim::HostDisk,
    ) -> Result<(i64, i64), Status> {
        let path = &wanted.host_path;
        let access = match wanted.access.contains('w') {
            true => DiskAccess::ReadWrite,
            false => DiskAccess::ReadOnly,
        };
        let data = fs::metadata(path).map_err(|err| refused(path, err))?;
        if !data.file_type().is_block_device() {
            return Err(refused(path, "it is no block device"));
        }
        let mut disks = self.0.lock().await;
        if let Some(disk) = disks.values_mut().find(|disk| disk.device == data.rdev()) {
            if access == DiskAccess::ReadWrite && disk.access == DiskAccess::ReadOnly {
                return Err(refused(path, "another container of the pod has it read-only"));
            }
            disk.users.insert(container.to_owned());
            return Ok(disk.numbers);
        }
        let free = (0..MOST).find(|target| !disks.contains_key(target));
        let target =
            free.ok_or_else(|| refused(path, format!("a pod has at most {MOST} disks")))?;
        let writes = access == DiskAccess::ReadWrite;
        let device = File::options().read(true).write(writes).open(path);
        let device = device.map_err(|err| refused(path, err))?;
        let plugged = hardware.plug_disk(target, device.as_fd(), access).await;
        plugged.map_err(|err| refused(path, err))?;
        let request = agent::FindDiskRequest { target: target.into() };
        let found = match agent.find_disk(request).await {
            Ok(found) => found.into_inner(),
            Err(status) => {
                if let Err(err) = hardware.unplug_disk(target).await {
                    tracing::warn!(%err, path, "a disk that was not found cannot be unplugged");
                }
                return Err(status);
            }
        };
        let numbers = (i64::from(found.major), i64::from(found.minor));
        let users = BTreeSet::from([container.to_owned()]);
        disks.insert(target, Disk { device: data.rdev(), access, numbers, users });
        Ok(numbers)
    }

    /// Unplugs what no container has any more.
    pub async fn remove(&self, hardware: &Hardware, container: &str) -> Result<(), Status> {
        let mut disks = self.0.lock().await;
        for disk in disks.values_mut() {
            disk.users.remove(container);
        }
        let unused: Vec<u8> = disks
            .iter()
            .filter(|(_, disk)| disk.users.is_empty())
            .map(|(target, _)| *target)
            .collect();
        for target in unused {
            hardware
                .unplug_disk(target)
                .await
                .map_err(|err| Status::internal(format!("unplug disk {target}: {err}")))?;
            disks.remove(&target);
        }
        Ok(())
    }
}

fn write_into(
    spec: &mut Spec,
    disk: &shim::HostDisk,
    (major, minor): (i64, i64),
) -> Result<(), Status> {
    let missing = || refused(&disk.host_path, "the spec has no node for it");
    let linux = spec.linux_mut().as_mut().ok_or_else(missing)?;
    let mut devices = linux.devices_mut().iter_mut().flatten();
    let path = std::path::Path::new(&disk.container_path);
    let device = devices.find(|device| device.path() == path).ok_or_else(missing)?;
    device.set_major(major).set_minor(minor);
    let mut rule = LinuxDeviceCgroup::default();
    rule.set_allow(true)
        .set_typ(Some(LinuxDeviceType::B))
        .set_major(Some(major))
        .set_minor(Some(minor))
        .set_access(Some(disk.access.clone()));
    let resources = linux.resources_mut().get_or_insert_default();
    resources.devices_mut().get_or_insert_default().push(rule);
    Ok(())
}

fn refused(path: &str, why: impl std::fmt::Display) -> Status {
    Status::failed_precondition(format!("device {path}: {why}"))
}
