//! What is plugged into a running machine.
//!
//! The template has one empty slot, because that is the least that a start can be charged for. What may
//! ever be needed goes into it together, at the first need: a controller for disks, and a virtio-mem
//! device of the largest size it may ever have, nothing of it in use. From then on a disk is one command,
//! and memory is given and taken by telling the device a number. What is taken is the host's again: the
//! device has memory of its own, apart from the template's.
//!
//! Processors have places of their own, which cost a start nothing. The guest's kernel takes them for
//! present since it booted ([`crate::madt`]) and finds them there when it is told to use them.

use crate::{
    command::{MEMORY_ROOM_MB, SLOT},
    qmp::Qmp,
};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::{
    io,
    os::fd::BorrowedFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::sync::Mutex;

const DISKS: &str = "disks";
const MEMORY: &str = "more-memory";
const MEMORY_BACKEND: &str = "more-ram";
/// Of QEMU's numbered descriptors; the scratch disk has 1.
const FIRST_FDSET: u32 = 100;
/// The guest takes and gives memory in such pieces.
const PIECE_MB: u32 = 4;

/// A running machine's hardware. Cheap to clone. No call may be given up half way: QEMU's answer to it
/// would be taken for another's.
#[derive(Debug, Clone)]
pub struct Hardware {
    qmp: Arc<Mutex<Qmp>>,
    /// Memory that may ever be added.
    room_mb: u32,
    /// Whether there is anything to ask QEMU about. Changes with `qmp` locked.
    plugged: Arc<AtomicBool>,
}

/// What a guest may do with a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskAccess {
    /// Read it.
    ReadOnly,
    /// Write it as well.
    ReadWrite,
}

/// Memory besides what the machine was started with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MoreMemory {
    /// What the guest has been asked to use.
    pub wanted_mb: u32,
    /// What it uses.
    pub there_mb: u32,
}

impl Hardware {
    pub(crate) fn new(qmp: Arc<Mutex<Qmp>>, room_mb: u32) -> Self {
        let room_mb = room_mb.next_multiple_of(PIECE_MB).min(MEMORY_ROOM_MB);
        Self { qmp, room_mb, plugged: Arc::default() }
    }

    /// Asks the guest to use so much memory besides what it was started with. It gives back only what it
    /// can spare, in its time.
    ///
    /// # Errors
    /// More than there is room for, QEMU's refusal, or its end.
    pub async fn ask_for_memory(&self, wanted_mb: u32) -> io::Result<MoreMemory> {
        let wanted_mb = wanted_mb.next_multiple_of(PIECE_MB);
        if wanted_mb > self.room_mb {
            let why = format!("{wanted_mb} MiB are more than the {} MiB to add", self.room_mb);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let mut qmp = self.qmp.lock().await;
        qmp.drop_events();
        if wanted_mb == 0 && !self.plugged.load(Ordering::Relaxed) {
            return Ok(MoreMemory::default());
        }
        self.plug(&mut qmp).await?;
        let path = format!("/machine/peripheral/{MEMORY}");
        let size = u64::from(wanted_mb) << 20;
        let order = json!({ "path": path, "property": "requested-size", "value": size });
        qmp.execute("qom-set", order).await?;
        memory(&mut qmp).await
    }

    /// Plugs in processors until there are so many. They stay: it is the guest that uses fewer again.
    ///
    /// # Errors
    /// More than there is room for, QEMU's refusal, or its end. Those that were plugged in stay.
    pub async fn plug_processors(&self, count: u32) -> io::Result<()> {
        let mut qmp = self.qmp.lock().await;
        qmp.drop_events();
        let answer = qmp.execute("query-hotpluggable-cpus", json!({})).await?;
        let mut places: Vec<Place> = serde_json::from_value(answer)?;
        if places.len() < count as usize {
            let why = format!("{count} are more than the {} processors to have", places.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        places.sort_by_key(Place::number);
        for place in places.into_iter().take(count as usize).filter(|place| place.device.is_none())
        {
            let mut order = place.props.clone();
            order.insert("driver".to_owned(), place.model.clone().into());
            order.insert("id".to_owned(), format!("processor-{}", place.number()).into());
            qmp.execute("device_add", Value::Object(order)).await?;
        }
        Ok(())
    }

    /// How much memory there is besides what the machine was started with.
    ///
    /// # Errors
    /// QEMU's end.
    pub async fn more_memory(&self) -> io::Result<MoreMemory> {
        if !self.plugged.load(Ordering::Relaxed) {
            return Ok(MoreMemory::default());
        }
        let mut qmp = self.qmp.lock().await;
        qmp.drop_events();
        memory(&mut qmp).await
    }

    /// Plugs in a block device of the node, as the controller's target of that number. With a descriptor
    /// for reading alone it is read-only, whatever the guest does.
    ///
    /// # Errors
    /// QEMU's refusal, or its end. Nothing is left of the disk.
    pub async fn plug_disk(
        &self,
        target: u8,
        device: BorrowedFd<'_>,
        access: DiskAccess,
    ) -> io::Result<()> {
        let mut qmp = self.qmp.lock().await;
        qmp.drop_events();
        self.plug(&mut qmp).await?;
        let set = FIRST_FDSET + u32::from(target);
        qmp.add_fd(set, device).await?;
        let plugged = plug_disk(&mut qmp, target, set, access).await;
        if plugged.is_err() {
            qmp.execute("remove-fd", json!({ "fdset-id": set })).await?;
        }
        plugged
    }

    /// Takes it out again, and lets go of the device.
    ///
    /// # Errors
    /// QEMU's refusal, or its end.
    pub async fn unplug_disk(&self, target: u8) -> io::Result<()> {
        let mut qmp = self.qmp.lock().await;
        qmp.drop_events();
        let (id, set) = (disk_id(target), FIRST_FDSET + u32::from(target));
        qmp.execute("device_del", json!({ "id": id })).await?;
        qmp.device_deleted(&id).await?;
        qmp.execute("blockdev-del", json!({ "node-name": id })).await?;
        // The set goes with its last descriptor.
        qmp.execute("remove-fd", json!({ "fdset-id": set })).await.map(drop)
    }

    /// Fills the slot, once. The guest looks at all functions when the first of them appears, so that one
    /// comes last.
    async fn plug(&self, qmp: &mut Qmp) -> io::Result<()> {
        if self.plugged.load(Ordering::Relaxed) {
            return Ok(());
        }
        let backend = json!({
            "qom-type": "memory-backend-ram", "id": MEMORY_BACKEND,
            "size": u64::from(self.room_mb) << 20, "reserve": false,
        });
        qmp.execute("object-add", backend).await?;
        let memory = json!({
            "driver": "virtio-mem-pci", "id": MEMORY, "bus": SLOT, "addr": "0.1",
            "memdev": MEMORY_BACKEND, "requested-size": 0,
        });
        qmp.execute("device_add", memory).await?;
        let disks = json!({
            "driver": "virtio-scsi-pci", "id": DISKS, "bus": SLOT, "addr": "0.0",
            "multifunction": true, "num_queues": 1,
        });
        qmp.execute("device_add", disks).await?;
        self.plugged.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// Where a processor is, or may be.
#[derive(Debug, Deserialize)]
struct Place {
    #[serde(rename = "type")]
    model: String,
    props: Map<String, Value>,
    /// The one that is there.
    #[serde(rename = "qom-path")]
    device: Option<String>,
}

impl Place {
    fn number(&self) -> u32 {
        self.props["core-id"].as_u64().map_or(0, |number| number as u32)
    }
}

async fn plug_disk(qmp: &mut Qmp, target: u8, set: u32, access: DiskAccess) -> io::Result<()> {
    let id = disk_id(target);
    let node = json!({
        "driver": "host_device", "node-name": id, "filename": format!("/dev/fdset/{set}"),
        "read-only": access == DiskAccess::ReadOnly, "discard": "unmap",
    });
    qmp.execute("blockdev-add", node).await?;
    let disk = json!({
        "driver": "scsi-hd", "id": id, "bus": format!("{DISKS}.0"), "drive": id,
        "scsi-id": target, "lun": 0,
    });
    let plugged = qmp.execute("device_add", disk).await;
    if plugged.is_err() {
        qmp.execute("blockdev-del", json!({ "node-name": id })).await?;
    }
    plugged.map(drop)
}

fn disk_id(target: u8) -> String {
    format!("disk-{target}")
}

async fn memory(qmp: &mut Qmp) -> io::Result<MoreMemory> {
    let devices = qmp.execute("query-memory-devices", json!({})).await?;
    let mut all = devices.as_array().into_iter().flatten().map(|device| &device["data"]);
    let data = all.find(|data| data["id"] == MEMORY);
    let data = data.ok_or_else(|| io::Error::other("QEMU has lost the machine's memory device"))?;
    let megabytes = |key: &str| (data[key].as_u64().unwrap_or(0) >> 20) as u32;
    Ok(MoreMemory { wanted_mb: megabytes("requested-size"), there_mb: megabytes("size") })
}
