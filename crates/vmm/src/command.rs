//! QEMU's command line: the same machine for template, clone and boot, so that a template's device
//! state fits a clone. Change a device here and [`crate::template::FORMAT`] with it.

use crate::madt;
use a3s_box_sys::spawn::{Identity, Spawn};
use a3s_box_types::shim::{Accel, VmConfig};
use std::{
    fs,
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::Path,
};

/// Descriptor numbers inside QEMU.
mod fd {
    pub(super) const QMP: i32 = 10;
    pub(super) const AGENT: i32 = 11;
    pub(super) const VOLUMES: i32 = 12;
    pub(super) const CONSOLE: i32 = 13;
    pub(super) const TAP: i32 = 14;
    pub(super) const DISK: i32 = 15;
    pub(super) const RAM: i32 = 16;
    pub(super) const KERNEL: i32 = 17;
    pub(super) const INITRAMFS: i32 = 18;
    /// The device state a clone loads.
    pub(super) const STATE: i32 = 19;
    /// The table of processors, for a guest that boots.
    pub(super) const PROCESSORS: i32 = 20;
    /// The first lane; the others follow.
    pub(super) const LANES: i32 = 21;
}

/// The address QMP's `migrate-incoming` takes for the device state.
pub(crate) const STATE_URI: &str = "fd:19";

/// The guest's kernel arguments. A panic ends the machine at once. Grace periods are expedited: a
/// container's birth waits for several, and a guest has few processors to disturb.
const KERNEL_ARGS: &str = "console=ttyS0 loglevel=4 panic=-1 reboot=t swiotlb=noforce random.trust_cpu=on rcupdate.rcu_expedited=1 memory_hotplug.online_policy=auto-movable";
/// And with each accelerator. A translator knows code by its address: where every process has its
/// libraries elsewhere, it translates them anew for each. The flaws that are mitigated are of
/// processors that execute the guest themselves. See docs/decisions/0014.
const KVM_ARGS: &str = "mitigations=auto";
const TCG_ARGS: &str = "mitigations=off norandmaps";

/// Addresses for memory that is plugged in later, in MiB; they cost nothing.
pub(crate) const MEMORY_ROOM_MB: u32 = 256 << 10;

/// The slot for what is plugged in later: a device in it from the start would cost every pod its time.
pub(crate) const SLOT: &str = "plug";

/// Number of the first port that is a lane; before it are the agent's and the share's.
const FIRST_LANE: u32 = 3;

/// What QEMU is given besides its arguments.
pub(crate) struct Wires {
    pub qmp: OwnedFd,
    pub agent: OwnedFd,
    pub volumes: OwnedFd,
    pub lanes: Vec<OwnedFd>,
    pub console: OwnedFd,
    pub tap: OwnedFd,
    pub disk: OwnedFd,
}

/// Where the guest's memory and first instruction come from.
pub(crate) enum Origin {
    /// A kernel; memory is QEMU's own.
    Boot(Boot),
    /// A kernel; memory is the shared file `ram`.
    Template { boot: Boot, ram: OwnedFd },
    /// A private view of the sealed file `ram`, and the device state in `state`.
    Clone { ram: OwnedFd, state: OwnedFd },
}

/// What a guest boots from.
pub(crate) struct Boot {
    pub kernel: OwnedFd,
    pub initramfs: OwnedFd,
    /// The body of [`crate::madt`]'s table.
    pub processors: OwnedFd,
}

/// QEMU for `config`, ready to start.
pub(crate) fn qemu(config: &VmConfig, wires: Wires, origin: Origin) -> Spawn {
    let mut qemu = Spawn::new(&config.qemu);
    qemu.session = true;
    qemu.death_signal = Some(libc_sigkill());
    // QEMU asks for them for the guest's memory, of which a pod would then have far more than it uses. A
    // clone's cannot be in them, being a file's, so its translator's code may.
    qemu.no_huge_pages = !matches!((config.accel, &origin), (Accel::Tcg, Origin::Clone { .. }));
    qemu.identity = Some(Identity { uid: config.uid, groups: kvm_group(config.accel) });
    machine(&mut qemu, config);
    memory_and_start(&mut qemu, config, origin);
    devices(&mut qemu, config.accel, wires);
    qemu
}

fn libc_sigkill() -> i32 {
    rustix::process::Signal::KILL.as_raw()
}

fn machine(qemu: &mut Spawn, config: &VmConfig) {
    args(qemu, &["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    args(qemu, &["-name", "a3s-box,debug-threads=on"]);
    args(
        qemu,
        &["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"],
    );
    args(
        qemu,
        &["-machine", "q35,memory-backend=ram,sata=off,smbus=off,hpet=off,vmport=off,i8042=off"],
    );
    match config.accel {
        Accel::Kvm => args(qemu, &["-accel", "kvm", "-cpu", "host"]),
        // la57 would make every page walk five levels deep, and erms has pages cleared and copied byte
        // by byte, which is fast in hardware only.
        Accel::Tcg => {
            // A processor that is alone needs no atomic instructions of the host, and has all of the
            // translated code in one piece.
            let thread = if config.size.vcpus == 1 { "single" } else { "multi" };
            let accel = format!("tcg,tb-size=128,thread={thread}");
            args(qemu, &["-accel", &accel, "-cpu", "max,la57=off,erms=off"]);
        }
    }
    let most = config.further_vcpus().end;
    let smp = format!("cpus={},maxcpus={most},sockets=1,cores={most},threads=1", config.size.vcpus);
    args(qemu, &["-smp", &smp]);
    let memory_mb = config.size.memory_mb;
    let most_mb = u64::from(memory_mb) + u64::from(MEMORY_ROOM_MB);
    args(qemu, &["-m", &format!("{memory_mb}M,maxmem={most_mb}M")]);
}

fn memory_and_start(qemu: &mut Spawn, config: &VmConfig, origin: Origin) {
    let size = config.size.memory_mb;
    let file = |share| {
        format!(
            "memory-backend-file,id=ram,size={size}M,share={share},mem-path=/proc/self/fd/{}",
            fd::RAM
        )
    };
    let boot = |qemu: &mut Spawn, boot: Boot| {
        qemu.fd(boot.kernel, fd::KERNEL).fd(boot.initramfs, fd::INITRAMFS);
        args(qemu, &["-kernel", &path(fd::KERNEL), "-initrd", &path(fd::INITRAMFS)]);
        qemu.fd(boot.processors, fd::PROCESSORS);
        let table = format!("sig=APIC,rev={},data={}", madt::REVISION, path(fd::PROCESSORS));
        args(qemu, &["-acpitable", &table]);
        let more = match config.accel {
            Accel::Kvm => KVM_ARGS,
            Accel::Tcg => TCG_ARGS,
        };
        // Our table of processors stands behind QEMU's, and not all in it are there yet.
        let vcpus = format!("acpi_apic_instance=2 maxcpus={}", config.size.vcpus);
        args(qemu, &["-append", &format!("{KERNEL_ARGS} {vcpus} {more}")]);
    };
    match origin {
        Origin::Boot(from) => {
            args(qemu, &["-object", &format!("memory-backend-ram,id=ram,size={size}M")]);
            boot(qemu, from);
        }
        Origin::Template { boot: from, ram } => {
            qemu.fd(ram, fd::RAM);
            args(qemu, &["-object", &file("on")]);
            boot(qemu, from);
        }
        Origin::Clone { ram, state } => {
            qemu.fd(ram, fd::RAM).fd(state, fd::STATE);
            args(qemu, &["-object", &file("off"), "-incoming", "defer"]);
        }
    }
}

fn devices(qemu: &mut Spawn, accel: Accel, wires: Wires) {
    qemu.fd(wires.qmp, fd::QMP)
        .fd(wires.agent, fd::AGENT)
        .fd(wires.volumes, fd::VOLUMES)
        .fd(wires.console, fd::CONSOLE)
        .fd(wires.tap, fd::TAP)
        .fd(wires.disk, fd::DISK);
    for (id, number) in
        [("qmp", fd::QMP), ("agent", fd::AGENT), ("volumes", fd::VOLUMES), ("console", fd::CONSOLE)]
    {
        args(qemu, &["-chardev", &format!("socket,id={id},fd={number}")]);
    }
    args(qemu, &["-mon", "chardev=qmp,mode=control"]);
    args(qemu, &["-serial", "chardev:console"]);
    // Who tells the host that there is something to fetch: a translator's processor is a thread that may
    // fetch it itself, which is quicker than to wake another; KVM's would leave its guest for it.
    let kicks = match accel {
        Accel::Kvm => "on",
        Accel::Tcg => "off",
    };
    // The first port is a console's, which there is none of. Each port has two queues and so has the device
    // itself: with an interrupt for each, and one for changes, the guest need not ask them all who it was.
    let ports = FIRST_LANE + a3s_box_lane::COUNT;
    let vectors = 2 * (ports + 1) + 1;
    let serial = format!(
        "virtio-serial-pci,id=serial,max_ports={ports},vectors={vectors},ioeventfd={kicks}"
    );
    args(qemu, &["-device", &serial]);
    args(qemu, &["-device", "virtserialport,bus=serial.0,nr=1,chardev=agent,name=agent"]);
    args(qemu, &["-device", "virtserialport,bus=serial.0,nr=2,chardev=volumes,name=volumes"]);
    for (number, lane) in (0..).zip(wires.lanes) {
        let (nr, name, fd) =
            (FIRST_LANE + number, a3s_box_lane::name(number), fd::LANES + number as i32);
        qemu.fd(lane, fd);
        args(qemu, &["-chardev", &format!("socket,id={name},fd={fd}")]);
        let port = format!("virtserialport,bus=serial.0,nr={nr},chardev={name},name={name}");
        args(qemu, &["-device", &port]);
    }
    args(qemu, &["-netdev", &format!("tap,id=net,fd={},vhost=off", fd::TAP)]);
    args(qemu, &["-device", "virtio-net-pci,netdev=net,mac=02:00:00:00:00:01,romfile="]);
    args(qemu, &["-add-fd", &format!("fd={},set=1", fd::DISK)]);
    args(
        qemu,
        &[
            "-blockdev",
            "driver=file,node-name=disk,filename=/dev/fdset/1,locking=off,discard=unmap",
            "-device",
            "virtio-blk-pci,drive=disk",
        ],
    );
    args(qemu, &["-device", &format!("pcie-root-port,id={SLOT},chassis=1,slot=1")]);
    args(qemu, &["-device", "vmgenid,guid=auto"]);
    args(qemu, &["-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng"]);
}

fn args(qemu: &mut Spawn, args: &[&str]) {
    for arg in args {
        qemu.arg(*arg);
    }
}

fn path(fd: i32) -> String {
    format!("/proc/self/fd/{fd}")
}

/// The group that may open /dev/kvm, which QEMU does by itself.
fn kvm_group(accel: Accel) -> Vec<u32> {
    match accel {
        Accel::Kvm => {
            fs::metadata(Path::new("/dev/kvm")).map(|meta| meta.gid()).into_iter().collect()
        }
        Accel::Tcg => Vec::new(),
    }
}
