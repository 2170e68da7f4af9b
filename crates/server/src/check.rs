//! `a3s-box-cri check`: what this host can do for pods, and what each lack costs.
//!
//! What can be tried is tried: the accelerator by starting a guest, the TUN device by opening it,
//! programs by asking their version. Everything is made in a temporary folder and removed.

use crate::{config::Config, status::chain, templates::GuestTemplates};
use a3s_box_net::Cni;
use a3s_box_sys::cgroup::Hierarchies;
use a3s_box_types::shim::Accel;
use std::{fmt, fs, path::Path, process::Command, sync::Arc};

/// Below this much free room, images and pods' disks soon have none.
const ROOM_MIN_MB: u64 = 2048;
/// The oldest QEMU this is tested with.
const QEMU_MIN: (u32, u32) = (7, 2);

/// How bad a lack is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Nothing is lacking.
    Fine,
    /// Pods run, with less.
    Less,
    /// No pod runs.
    Broken,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What was looked at.
    pub what: &'static str,
    /// What was found.
    pub state: String,
    /// What the lack costs; empty when nothing lacks.
    pub cost: &'static str,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = match self.severity {
            Severity::Fine => "ok",
            Severity::Less => "less",
            Severity::Broken => "BROKEN",
        };
        write!(f, "{mark:<7} {:<12} {}", self.what, self.state)?;
        if !self.cost.is_empty() {
            write!(f, "\n{:<21}-> {}", "", self.cost)?;
        }
        Ok(())
    }
}

/// Looks at everything.
pub async fn check(config: &Config) -> anyhow::Result<Vec<Finding>> {
    let work = tempfile::Builder::new().prefix("a3s-box-check-").tempdir()?;
    let room = room(&config.root);
    let state = state_folder(&config.state);
    let config = Config { root: work.path().to_owned(), ..config.clone() };
    let mut findings = vec![privileges(), tun(Path::new("/dev/net/tun"))];
    findings.extend(programs(&config));
    findings.extend(guest(&config).await);
    findings.push(network(&config));
    findings.push(cgroups());
    findings.push(users(config.vm.uid_base, config.vm.uid_count, Path::new("/etc")));
    findings.extend([room, state]);
    Ok(findings)
}

/// The worst of all.
pub fn worst(findings: &[Finding]) -> Severity {
    findings.iter().map(|finding| finding.severity).max().unwrap_or(Severity::Fine)
}

fn fine(what: &'static str, state: impl Into<String>) -> Finding {
    Finding { severity: Severity::Fine, what, state: state.into(), cost: "" }
}

fn less(what: &'static str, state: impl Into<String>, cost: &'static str) -> Finding {
    Finding { severity: Severity::Less, what, state: state.into(), cost }
}

fn broken(what: &'static str, state: impl Into<String>, cost: &'static str) -> Finding {
    Finding { severity: Severity::Broken, what, state: state.into(), cost }
}

fn privileges() -> Finding {
    if rustix::process::geteuid().is_root() {
        fine("user", "root")
    } else {
        broken("user", "not root", "namespaces, mounts and taps cannot be made")
    }
}

fn tun(device: &Path) -> Finding {
    match fs::File::options().read(true).write(true).open(device) {
        Ok(_) => fine("tun", device.display().to_string()),
        Err(error) => broken(
            "tun",
            format!("{}: {error}", device.display()),
            "virtual machines get no network card; load the kernel module tun",
        ),
    }
}

/// Programs of others that are run.
fn programs(config: &Config) -> Vec<Finding> {
    let qemu = match version(&config.vm.qemu, "--version") {
        Err(why) => broken("qemu", why, "no virtual machine can be started"),
        Ok(text) => match numbers(&text) {
            Some(found) if found < QEMU_MIN => {
                less("qemu", text, "older than 7.2, with which nobody has tried this")
            }
            _ => fine("qemu", text),
        },
    };
    let erofs = match version(Path::new("mkfs.erofs"), "--version") {
        Ok(text) => fine("mkfs.erofs", text),
        Err(why) => broken("mkfs.erofs", why, "no image can be pulled; package erofs-utils"),
    };
    let ext4 = match version(Path::new("mkfs.ext4"), "-V") {
        Ok(text) => fine("mkfs.ext4", text),
        Err(why) => broken("mkfs.ext4", why, "pods get no disk to write to; package e2fsprogs"),
    };
    vec![qemu, erofs, ext4]
}

/// The first line a program says about itself.
fn version(program: &Path, flag: &str) -> Result<String, String> {
    let output = Command::new(program).arg(flag).output();
    let output = output.map_err(|error| format!("{}: {error}", program.display()))?;
    let said = if output.stdout.is_empty() { output.stderr } else { output.stdout };
    let said = String::from_utf8_lossy(&said);
    let line = said.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    // mkfs.erofs 1.5 tells its version and fails.
    if output.status.success() || line.starts_with("mkfs.erofs ") {
        Ok(line.to_owned())
    } else {
        Err(format!("{} {flag}: {} {line}", program.display(), output.status))
    }
}

/// The first `major.minor` in a text.
fn numbers(text: &str) -> Option<(u32, u32)> {
    text.split_whitespace().find_map(|word| {
        let mut parts = word.split('.');
        Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    })
}

/// The guest's files, and a guest that is started from them.
async fn guest(config: &Config) -> Vec<Finding> {
    let templates = GuestTemplates::new(config, Arc::default());
    if let Some(why) = templates.missing() {
        return vec![broken("guest", why, "no virtual machine can be started")];
    }
    let files = format!("{} {}", config.vm.kernel.display(), config.vm.initramfs.display());
    let mut findings = vec![fine("guest", files)];
    let (chosen, trial) = templates.try_out().await;
    findings.push(match chosen.accel {
        Accel::Kvm => fine("accelerator", format!("KVM: {}", chosen.why)),
        Accel::Tcg => less(
            "accelerator",
            format!("TCG: {}", chosen.why),
            "guests run translated, several times slower than on KVM",
        ),
    });
    findings.push(match trial {
        Ok(time) => fine("trial", format!("a guest booted and was frozen in {time:.1?}")),
        Err(why) => broken("trial", why, "no virtual machine can be started"),
    });
    findings
}

fn network(config: &Config) -> Finding {
    let network = &config.network;
    let records = config.root.join("cni");
    let cni = Cni::new(&network.conf_dir, &network.bin_dirs, &records, network.plugin_timeout);
    match cni.and_then(|cni| cni.ready()) {
        Ok(name) => fine("network", format!("CNI network {name:?}, its plugins are there")),
        Err(error) => broken(
            "network",
            chain(&error),
            "NetworkReady is false and pods cannot be started; install a CNI configuration",
        ),
    }
}

fn cgroups() -> Finding {
    let unified = Path::new("/sys/fs/cgroup/cgroup.controllers").is_file();
    match Hierarchies::find() {
        Ok(_) if unified => fine("cgroup", "version 2"),
        Ok(found) if found.has_v2() => {
            fine("cgroup", "version 1 controllers, version 2 beside them")
        }
        Ok(found) if found != Hierarchies::default() => less(
            "cgroup",
            "version 1 alone",
            "pods that share namespaces of the node do not run: mount -t cgroup2 cgroup2 \
             /sys/fs/cgroup/unified; guests have version 2 inside in any case",
        ),
        Ok(_) => less(
            "cgroup",
            "none",
            "virtual machines are not limited on the host, and pods that share namespaces of the \
             node do not run",
        ),
        Err(error) => less("cgroup", error.to_string(), "virtual machines may not be limited"),
    }
}

/// QEMU's user ids should be nobody else's.
fn users(base: u32, count: u32, etc: &Path) -> Finding {
    let range = base..base.saturating_add(count);
    let mut owners = Vec::new();
    for line in fs::read_to_string(etc.join("passwd")).unwrap_or_default().lines() {
        let mut fields = line.split(':');
        let (name, uid) = (fields.next(), fields.nth(1).and_then(|uid| uid.parse::<u32>().ok()));
        if uid.is_some_and(|uid| range.contains(&uid)) {
            owners.extend(name.map(str::to_owned));
        }
    }
    for line in fs::read_to_string(etc.join("subuid")).unwrap_or_default().lines() {
        let mut fields = line.split(':');
        let name = fields.next();
        let mut number = || fields.next().and_then(|number| number.parse::<u32>().ok());
        if let (Some(name), Some(first), Some(length)) = (name, number(), number())
            && first < range.end
            && range.start < first.saturating_add(length)
        {
            owners.push(format!("subordinate ids of {name}"));
        }
    }
    let state = format!("{} to {} for QEMU", range.start, range.end.saturating_sub(1));
    if owners.is_empty() {
        return fine("user ids", state);
    }
    let state = format!("{state}, but also of {}", owners.join(", "));
    less("user ids", state, "they could touch a pod's virtual machine; change vm.uid_base")
}

fn room(root: &Path) -> Finding {
    let existing =
        root.ancestors().find(|folder| folder.exists()).unwrap_or_else(|| Path::new("/"));
    match rustix::fs::statvfs(existing) {
        Ok(data) => {
            let free_mb = (data.f_bavail * data.f_frsize) >> 20;
            let state = format!("{free_mb} MiB free for {}", root.display());
            if free_mb >= ROOM_MIN_MB {
                fine("room", state)
            } else {
                less("room", state, "images and pods' disks will soon have none")
            }
        }
        Err(error) => less("room", format!("{}: {error}", existing.display()), "nobody knows"),
    }
}

/// What is in the state folder must end with the boot.
fn state_folder(state: &Path) -> Finding {
    const TMPFS: i64 = 0x0102_1994;
    let existing =
        state.ancestors().find(|folder| folder.exists()).unwrap_or_else(|| Path::new("/"));
    match rustix::fs::statfs(existing) {
        Ok(data) if data.f_type == TMPFS => fine("state", state.display().to_string()),
        _ => less(
            "state",
            format!("{} is not on a tmpfs", state.display()),
            "it takes a disk's time, and is not emptied by a reboot",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_ids_of_others_are_found() {
        let etc = tempfile::tempdir().unwrap();
        fs::write(etc.path().join("passwd"), "root:x:0:0::/:/x\nann:x:1005:1::/:/x\n").unwrap();
        fs::write(etc.path().join("subuid"), "bob:2000:100\n").unwrap();
        let found = |base, count| users(base, count, etc.path());
        assert_eq!(found(1000, 5).severity, Severity::Fine);
        assert!(found(1000, 6).state.ends_with("also of ann"));
        assert!(found(2099, 1).state.ends_with("subordinate ids of bob"));
        assert_eq!(found(2100, 1).severity, Severity::Fine);
    }

    #[test]
    fn versions_are_read_from_what_programs_say() {
        assert_eq!(numbers("QEMU emulator version 7.2.22 (Debian 1:7.2)"), Some((7, 2)));
        assert_eq!(numbers("nothing"), None);
        assert!(
            version(Path::new("/none/qemu"), "--version").unwrap_err().contains("No such file")
        );
    }

    #[test]
    fn a_missing_device_breaks_pods_and_its_cost_is_told() {
        let finding = tun(Path::new("/dev/none"));
        assert_eq!(finding.severity, Severity::Broken);
        let text = finding.to_string();
        assert!(text.starts_with("BROKEN  tun") && text.contains("-> virtual machines"), "{text}");
        assert_eq!(worst(&[fine("a", "b"), finding]), Severity::Broken);
    }
}
