//! The driver's shims as they are on a node: one process per sandbox, in the pod's cgroup.
//!
//! ```text
//! STATE/sandboxes/ID/   shim.json  cgroup  shim.sock  shim.log  console.log  processes.json  containers/
//! ROOT/sandboxes/ID/    disk.ext4, or scratch/ without a virtual machine, beside the server's records
//! ```
//!
//! Whether anything lives is read from the shim's own list of processes (pid and start time) and from
//! the pod's cgroup, whose name derives from the id; only what is found there is ever killed.

mod spare;

use super::{
    SandboxError, blocking,
    network::Link,
    shims::Shims,
    spec::{Boundary, SandboxSpec},
};
use crate::{shim_client::ShimClient, status::chain, vm_size::most_vcpus};
use a3s_box_api::shim::v1 as shim;
use a3s_box_sys::{
    cgroup::{Cgroup, Hierarchies, Limits},
    mount_table,
    pidfd::Identity,
    spawn::Spawn,
};
use a3s_box_types::{
    SandboxId,
    shim::{
        Accel, BoundaryConfig, CONFIG_FILE, CONTAINERS_DIR, CgroupName, ContainerPhase,
        ContainerRecord, HostConfig, MicrovmConfig, PROCESSES_FILE, Process, Processes,
        SOCKET_FILE, ShimConfig, Start, VmConfig, VmSize, fd, guest_mounts,
    },
};
use std::{
    collections::HashMap,
    fs::{self, DirBuilder, File},
    io::{self, Read, Seek, SeekFrom},
    os::{
        fd::{OwnedFd, RawFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
    process::Child,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::unix::pipe,
    signal::unix::{SignalKind, signal},
};
use tracing::{debug, warn};

/// Holds the parent of the pod's cgroup, for a teardown without a record; two while it moves.
const CGROUP_FILE: &str = "cgroup";
const LOG_FILE: &str = "shim.log";
const DISK_FILE: &str = "disk.ext4";
const SCRATCH_DIR: &str = "scratch";
/// Parent of pods' cgroups when kubelet names none: no folder of ours to be left behind.
const CGROUP_PARENT: &str = "/";

/// What QEMU and its helpers may use besides the guest's memory before the pod's own limit ends them.
const HOST_OVERHEAD_MB: u64 = 512;
/// How long a shim may take to end its boundary before it is killed.
const GRACE: Duration = Duration::from_secs(5);
/// How long killed processes may take to be gone.
const KILL_WAIT: Duration = Duration::from_secs(10);
/// Between two looks at processes that are about to end.
const POLL: Duration = Duration::from_millis(5);
/// How much of the shim's log stands in an error.
const LOG_TAIL: u64 = 2048;

/// How a virtual machine of some size is to be started.
#[derive(Debug)]
pub struct StartOrder {
    /// From a template, or from the kernel.
    pub start: Start,
    /// What executes the guest.
    pub accel: Accel,
    /// The template's sealed memory.
    pub ram: Option<OwnedFd>,
    /// Size of the writable layers' disk.
    pub disk_bytes: u64,
}

/// Knows the templates. The first pod of a size may wait for one to be made.
#[tonic::async_trait]
pub trait Templates: Send + Sync {
    /// How to start a machine of this size.
    async fn start_order(&self, size: VmSize) -> Result<StartOrder, SandboxError>;
    /// A clone of this size did not come to life, for this reason: the next guests are booted.
    async fn clone_failed(&self, size: VmSize, why: &str);
}

/// Where things are, and what the configuration says about machines.
#[derive(Debug, Clone)]
pub struct Places {
    /// The shim's program.
    pub shim: PathBuf,
    /// The agent's program.
    pub agent: PathBuf,
    /// QEMU's program.
    pub qemu: PathBuf,
    /// `STATE/sandboxes`.
    pub state: PathBuf,
    /// `ROOT/sandboxes`.
    pub root: PathBuf,
    /// First of the user ids that QEMU processes run as.
    pub uid_base: u32,
    /// How many there are.
    pub uid_count: u32,
    /// The most memory a machine may ever have, in MiB.
    pub most_memory_mb: u32,
    /// The most processors that a machine may ever have.
    pub max_vcpus: u32,
    /// For the shim's socket to listen.
    pub start_timeout: Duration,
}

/// Shims as processes of this host.
pub struct ShimProcesses {
    places: Places,
    hierarchies: Hierarchies,
    templates: Arc<dyn Templates>,
    /// Held while a shim is being spawned: a start that was given up may still be at it.
    spawning: Mutex<HashMap<SandboxId, Arc<tokio::sync::Mutex<()>>>>,
    children: Children,
}

/// Shims that this server started.
type Children = Arc<Mutex<Vec<Child>>>;

impl ShimProcesses {
    /// Shims of this server's sandboxes. Call inside a runtime.
    pub fn new(places: Places, templates: Arc<dyn Templates>) -> Result<Self, SandboxError> {
        let hierarchies =
            Hierarchies::find().map_err(|error| SandboxError::step("find cgroups", error))?;
        if hierarchies == Hierarchies::default() {
            warn!("no cgroup hierarchy is mounted here: pods are not limited on the host");
        }
        let children = Children::default();
        tokio::spawn(reap(children.clone()));
        Ok(Self { places, hierarchies, templates, spawning: Mutex::default(), children })
    }

    fn folder(&self, id: &SandboxId) -> PathBuf {
        self.places.state.join(id.as_str())
    }

    fn disk(&self, id: &SandboxId) -> PathBuf {
        self.places.root.join(id.as_str()).join(DISK_FILE)
    }

    fn scratch(&self, id: &SandboxId) -> PathBuf {
        self.places.root.join(id.as_str()).join(SCRATCH_DIR)
    }

    /// What the pod is to run in, and the descriptors that its shim needs for it.
    async fn boundary(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
        link: Link,
    ) -> Result<(BoundaryConfig, Vec<(OwnedFd, RawFd)>), SandboxError> {
        match (spec.boundary(), link) {
            (Boundary::Microvm, Link::Tap(tap)) => {
                let order = self.templates.start_order(spec.size).await?;
                let mut fds = vec![(tap, fd::TAP)];
                fds.extend(order.ram.map(|ram| (ram, fd::TEMPLATE_RAM)));
                let vm = VmConfig {
                    qemu: self.places.qemu.clone(),
                    accel: order.accel,
                    start: order.start,
                    size: spec.size,
                    most_vcpus: most_vcpus(spec.size, self.places.max_vcpus),
                    uid: uid(id, self.places.uid_base, self.places.uid_count),
                };
                let order = MicrovmConfig {
                    disk: self.disk(id),
                    disk_bytes: order.disk_bytes,
                    most_memory_mb: self.places.most_memory_mb,
                    vm,
                };
                Ok((BoundaryConfig::Microvm(order), fds))
            }
            (Boundary::Host, Link::Node) => Ok((self.host(id, spec, false), Vec::new())),
            (Boundary::Host, Link::Namespace(netns)) => {
                Ok((self.host(id, spec, true), vec![(netns, fd::NETNS)]))
            }
            (boundary, link) => {
                let why = format!("a boundary {boundary} has no use for {link:?}");
                Err(SandboxError::step("start the pod's shim", why))
            }
        }
    }

    fn host(&self, id: &SandboxId, spec: &SandboxSpec, own_network: bool) -> BoundaryConfig {
        BoundaryConfig::Host(HostConfig {
            agent: self.places.agent.clone(),
            scratch: self.scratch(id),
            cgroup: CgroupName { parent: parent(spec).to_owned(), name: cgroup_name(id) },
            own_network,
            own_ipc: !spec.node_namespaces.ipc,
        })
    }

    /// The pod's cgroup, or both while it moves; none when its name was never written, so nothing
    /// ever entered it.
    fn cgroups(&self, id: &SandboxId) -> Result<Vec<Cgroup>, SandboxError> {
        let file = self.folder(id).join(CGROUP_FILE);
        match fs::read_to_string(&file) {
            Ok(parents) => Ok(parents.lines().map(|one| self.cgroup_under(id, one)).collect()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(SandboxError::step("read the name of the pod's cgroup", error)),
        }
    }

    fn cgroup_under(&self, id: &SandboxId, parent: &str) -> Cgroup {
        Cgroup::new(self.hierarchies.clone(), parent, &cgroup_name(id))
    }

    fn spawning(&self, id: &SandboxId) -> Arc<tokio::sync::Mutex<()>> {
        let mut all = self.spawning.lock().unwrap_or_else(PoisonError::into_inner);
        all.entry(id.clone()).or_default().clone()
    }

    fn spawned(&self, id: &SandboxId) {
        self.spawning.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }

    /// The processes of the boundary that live.
    fn living(&self, id: &SandboxId) -> Result<Living, SandboxError> {
        let failed =
            |error: io::Error| SandboxError::step("look for the boundary's processes", error);
        let listed = match fs::read(self.folder(id).join(PROCESSES_FILE)) {
            Ok(bytes) => {
                let listed: Processes = serde_json::from_slice(&bytes)
                    .map_err(|error| SandboxError::step("read the shim's processes", error))?;
                listed.all().collect()
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(failed(error)),
        };
        let mut listed_alive = Vec::new();
        for process in listed {
            let identity = Identity { pid: process.pid, start_time: process.start_time };
            if identity.is_alive().map_err(failed)? {
                listed_alive.push(identity);
            }
        }
        let cgroups = self.cgroups(id)?;
        let mut members = 0;
        for cgroup in &cgroups {
            members += cgroup.processes().map_err(failed)?.len();
        }
        Ok(Living { listed: listed_alive, members, cgroups })
    }

    async fn wait_until_gone(&self, id: &SandboxId) -> Result<(), SandboxError> {
        let since = Instant::now();
        loop {
            let living = self.living(id)?;
            if living.none() {
                return Ok(());
            }
            living.kill()?;
            if since.elapsed() > KILL_WAIT {
                let step = "wait for the boundary's killed processes";
                return Err(SandboxError::Timeout { step, within: KILL_WAIT });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn remove_cgroup(&self, id: &SandboxId) -> Result<(), SandboxError> {
        let cgroups = self.cgroups(id)?;
        let since = Instant::now();
        loop {
            match cgroups.iter().try_for_each(Cgroup::remove) {
                Ok(()) => return Ok(()),
                // The kernel is still letting go of the last process.
                Err(error)
                    if error.kind() == io::ErrorKind::ResourceBusy
                        && since.elapsed() < KILL_WAIT => {}
                Err(error) => return Err(SandboxError::step("remove the pod's cgroup", error)),
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The shim's one line, or why there is none.
    async fn wait_ready(&self, id: &SandboxId, ready: pipe::Receiver) -> Result<(), SandboxError> {
        const STEP: &str = "start the pod's shim";
        let mut text = String::new();
        let mut ready = BufReader::new(ready);
        let read = ready.read_line(&mut text);
        let said = match tokio::time::timeout(self.places.start_timeout, read).await {
            Ok(Ok(_)) => text.trim_end(),
            Ok(Err(error)) => return Err(SandboxError::step(STEP, error)),
            Err(_) => {
                let within = self.places.start_timeout;
                return Err(SandboxError::Timeout { step: STEP, within });
            }
        };
        if said == "ready" {
            return Ok(());
        }
        let why = match said.strip_prefix("error: ") {
            Some(why) => why.to_owned(),
            None => format!("it ended without a word; {}", log_tail(&self.folder(id))),
        };
        Err(SandboxError::step(STEP, why))
    }
}

/// Unmounts what the shim has shown of its guest and not taken away itself.
async fn unmount_guests(id: &SandboxId) -> Result<(), SandboxError> {
    const STEP: &str = "unmount what the guest had mounted";
    let theirs = guest_mounts(id);
    blocking(STEP, move || {
        mount_table::abort_all(|mount| mount.source.starts_with(&theirs))
            .map_err(|error| SandboxError::step(STEP, error))
    })
    .await
}

/// What is left of a boundary's processes.
struct Living {
    listed: Vec<Identity>,
    members: usize,
    cgroups: Vec<Cgroup>,
}

impl Living {
    fn none(&self) -> bool {
        self.listed.is_empty() && self.members == 0
    }

    fn kill(&self) -> Result<(), SandboxError> {
        let failed = |error| SandboxError::step("kill the boundary's processes", error);
        for process in &self.listed {
            process.kill().map_err(failed)?;
        }
        for cgroup in &self.cgroups {
            cgroup.kill().map_err(failed)?;
        }
        Ok(())
    }
}

impl ShimProcesses {
    async fn begin(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
        link: Link,
        limits: Limits,
    ) -> Result<(), SandboxError> {
        let (boundary, fds) = self.boundary(id, spec, link).await?;
        let birth = Birth {
            program: self.places.shim.clone(),
            folder: self.folder(id),
            config: ShimConfig { version: 1, sandbox_id: id.clone(), boundary },
            cgroup: self.cgroup_under(id, parent(spec)),
            cgroup_parent: parent(spec).to_owned(),
            limits,
            oom_score_adj: spec.host_limits.oom_score_adj,
            fds,
            children: self.children.clone(),
        };
        // Moved into the work, which goes on when the caller gives up: `end` waits for it.
        let spawning = self.spawning(id).lock_owned().await;
        let ready = blocking("start the pod's shim", move || {
            let born = birth.give();
            drop(spawning);
            born.map_err(|error| SandboxError::step("start the pod's shim", error))
        })
        .await?;
        let ready = pipe::Receiver::from_owned_fd(ready)
            .map_err(|error| SandboxError::step("start the pod's shim", error))?;
        self.wait_ready(id, ready).await
    }
}

#[tonic::async_trait]
impl Shims for ShimProcesses {
    async fn start(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
        link: Link,
    ) -> Result<(), SandboxError> {
        self.begin(id, spec, link, limits(spec)).await
    }

    async fn start_spare(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
        link: Link,
    ) -> Result<(), SandboxError> {
        self.begin_spare(id, spec, link).await
    }

    fn is_spare(&self, id: &SandboxId) -> bool {
        self.marked_spare(id)
    }

    async fn claim(&self, id: &SandboxId, spec: &SandboxSpec) -> Result<bool, SandboxError> {
        self.claim_spare(id, spec).await
    }

    async fn move_in(&self, id: &SandboxId, spec: &SandboxSpec) -> Result<(), SandboxError> {
        self.move_spare(id, spec).await
    }

    async fn clone_failed(&self, id: &SandboxId, spec: &SandboxSpec) -> bool {
        let asked = tokio::time::timeout(GRACE, self.client(id).state()).await;
        let Ok(Ok(state)) = asked else { return false };
        if state.clone_failed {
            self.templates.clone_failed(spec.size, &state.end_reason).await;
        }
        state.clone_failed
    }

    async fn limit(&self, id: &SandboxId, spec: &SandboxSpec) -> Result<(), SandboxError> {
        let (cgroups, limits) = (self.cgroups(id)?, limits(spec));
        blocking("limit the pod's cgroup on the host", move || {
            let unset: Vec<_> = cgroups.iter().flat_map(|cgroup| cgroup.update(&limits)).collect();
            if !unset.is_empty() {
                warn!(limits = unset.join("; "), "the pod's host cgroup is not limited as asked");
            }
            Ok(())
        })
        .await
    }

    fn client(&self, id: &SandboxId) -> ShimClient {
        ShimClient::new(self.folder(id).join(SOCKET_FILE))
    }

    async fn is_alive(&self, id: &SandboxId) -> Result<bool, SandboxError> {
        Ok(!self.living(id)?.none())
    }

    async fn last_words(&self, id: &SandboxId) -> Vec<shim::ContainerState> {
        let folder = self.folder(id).join(CONTAINERS_DIR);
        let read = move || Ok(read_containers(&folder));
        blocking("read the shim's records", read).await.unwrap_or_default()
    }

    async fn end(&self, id: &SandboxId) -> Result<(), SandboxError> {
        drop(self.spawning(id).lock_owned().await);
        self.spawned(id);
        if self.folder(id).join(SOCKET_FILE).exists() {
            let asked = tokio::time::timeout(GRACE, self.client(id).shutdown()).await;
            if let Ok(Err(error)) = asked {
                debug!(error = chain(&error), "the shim is killed instead");
            }
        }
        // A process that waits for a dead guest does not even end when it is killed.
        unmount_guests(id).await?;
        self.wait_until_gone(id).await?;
        // The shim may have mounted one more.
        unmount_guests(id).await?;
        self.remove_cgroup(id).await?;
        let (disk, scratch) = (self.disk(id), self.scratch(id));
        blocking("remove what the pod wrote", move || {
            gone(fs::remove_file(&disk), "remove the pod's disk")?;
            gone(fs::remove_dir_all(&scratch), "remove the pod's writable layers")
        })
        .await
    }

    async fn forget(&self, id: &SandboxId) -> Result<(), SandboxError> {
        let folder = self.folder(id);
        blocking("remove the shim's folder", move || {
            gone(fs::remove_dir_all(&folder), "remove the shim's folder")
        })
        .await
    }

    async fn leftovers(&self) -> Result<Vec<SandboxId>, SandboxError> {
        let failed = |error| SandboxError::step("look for shims' folders", error);
        let mut found = Vec::new();
        let entries = match fs::read_dir(&self.places.state) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(found),
            Err(error) => return Err(failed(error)),
        };
        for entry in entries {
            let name = entry.map_err(failed)?.file_name();
            found.extend(name.to_str().and_then(|name| name.parse::<SandboxId>().ok()));
        }
        Ok(found)
    }
}

/// Everything a shim is started with.
struct Birth {
    program: PathBuf,
    folder: PathBuf,
    config: ShimConfig,
    cgroup: Cgroup,
    cgroup_parent: String,
    limits: Limits,
    oom_score_adj: i32,
    fds: Vec<(OwnedFd, RawFd)>,
    children: Children,
}

impl Birth {
    /// Starts it; the pipe on which it says that it is ready.
    fn give(self) -> io::Result<OwnedFd> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        // Before the cgroup is made: whoever finds it knows where from.
        fs::write(self.folder.join(CGROUP_FILE), &self.cgroup_parent)?;
        fs::write(self.folder.join(CONFIG_FILE), serde_json::to_vec_pretty(&self.config)?)?;
        let (doors, unset) = self.cgroup.create(&self.limits)?;
        if !unset.is_empty() {
            warn!(limits = unset.join("; "), "the pod's host cgroup is not limited as asked");
        }
        let log = File::options().create(true).append(true).open(self.folder.join(LOG_FILE))?;
        let (reader, writer) = io::pipe()?;
        let mut spawn = Spawn::new(self.program);
        spawn.arg(&self.folder);
        spawn.fd(writer, fd::READY);
        spawn.fds.extend(self.fds);
        spawn.output = Some(log.into());
        spawn.session = true;
        spawn.cgroups = doors;
        let child = spawn.start()?;
        adjust_oom_score(child.id(), self.oom_score_adj);
        note_process(&self.folder, child.id())?;
        self.children.lock().unwrap_or_else(PoisonError::into_inner).push(child);
        Ok(reader.into())
    }
}

/// Notes the shim until it has written the list itself, which it may have by now.
fn note_process(folder: &Path, pid: u32) -> io::Result<()> {
    let Ok(Identity { pid, start_time }) = Identity::of(pid) else { return Ok(()) };
    let shim = Process { pid, start_time };
    let list = serde_json::to_vec(&Processes::new(shim))?;
    match File::create_new(folder.join(PROCESSES_FILE)) {
        Ok(mut file) => io::Write::write_all(&mut file, &list),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    }
}

/// QEMU inherits it from the shim. Lowering it needs CAP_SYS_RESOURCE.
fn adjust_oom_score(pid: u32, score: i32) {
    if score == 0 {
        return;
    }
    if let Err(error) = fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()) {
        debug!(%error, score, "oom_score_adj of the shim stays");
    }
}

/// Takes the exits of shims that are this server's children, so that they do not stay as zombies.
async fn reap(children: Children) {
    let mut signals = match signal(SignalKind::child()) {
        Ok(signals) => signals,
        Err(error) => return warn!(%error, "ended shims stay as zombies"),
    };
    while signals.recv().await.is_some() {
        let mut children = children.lock().unwrap_or_else(PoisonError::into_inner);
        children.retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
    }
}

fn cgroup_name(id: &SandboxId) -> String {
    format!("a3s-box-{id}")
}

/// The cgroup above the pod's.
pub(crate) fn parent(spec: &SandboxSpec) -> &str {
    if spec.cgroup_parent.is_empty() { CGROUP_PARENT } else { &spec.cgroup_parent }
}

/// What the pod's processes on the host may use.
pub(crate) fn limits(spec: &SandboxSpec) -> Limits {
    let host = &spec.host_limits;
    Limits {
        cpu_shares: host.cpu_shares,
        cpu_quota: host.cpu_quota,
        cpu_period: host.cpu_period,
        cpuset_cpus: host.cpuset_cpus.clone(),
        cpuset_mems: host.cpuset_mems.clone(),
        // On the node's own kernel the containers' limits and those of kubelet's cgroup are the pod's.
        memory_max: match spec.boundary() {
            Boundary::Microvm => (u64::from(spec.size.memory_mb) + HOST_OVERHEAD_MB) << 20,
            Boundary::Host => 0,
        },
    }
}

/// The user id of the sandbox's QEMU.
fn uid(id: &SandboxId, base: u32, count: u32) -> u32 {
    // An id is hex, so this always parses.
    let number = u32::from_str_radix(&id.as_str()[..8], 16).unwrap_or_default();
    base + number % count.max(1)
}

fn read_containers(folder: &Path) -> Vec<shim::ContainerState> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let record = |entry: io::Result<fs::DirEntry>| {
        let bytes = fs::read(entry.ok()?.path()).ok()?;
        serde_json::from_slice::<ContainerRecord>(&bytes).ok()
    };
    entries.filter_map(record).map(to_state).collect()
}

fn to_state(record: ContainerRecord) -> shim::ContainerState {
    use shim::container_state::Phase;
    let phase = match record.phase {
        ContainerPhase::Created => Phase::Created,
        ContainerPhase::Running => Phase::Running,
        ContainerPhase::Exited => Phase::Exited,
    };
    shim::ContainerState {
        container_id: record.container_id.to_string(),
        phase: phase.into(),
        created_at: record.created_at,
        started_at: record.started_at,
        exit: record.exit.map(|exit| a3s_box_api::agent::v1::Exit {
            code: exit.code,
            signal: exit.signal,
            exited_at: exit.exited_at,
            oom_killed: exit.oom_killed,
            cause: exit.cause,
        }),
        guest_pid: record.guest_pid,
        uid: record.uid,
        gid: record.gid,
        groups: record.groups,
        end_reason: record.end_reason,
    }
}

fn log_tail(folder: &Path) -> String {
    let read = || -> io::Result<String> {
        let mut file = File::open(folder.join(LOG_FILE))?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    };
    match read() {
        Ok(text) if text.is_empty() => "its log is empty".to_owned(),
        Ok(text) => format!("its log ends: {text}"),
        Err(error) => format!("its log cannot be read: {error}"),
    }
}

fn gone(result: io::Result<()>, step: &'static str) -> Result<(), SandboxError> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(SandboxError::step(step, error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::{spec::NodeNamespaces, tests::spec};
    use std::os::unix::fs::PermissionsExt;

    struct OneTemplate;

    #[tonic::async_trait]
    impl Templates for OneTemplate {
        async fn start_order(&self, _: VmSize) -> Result<StartOrder, SandboxError> {
            let start = Start::Boot { kernel: "/k".into(), initramfs: "/i".into() };
            Ok(StartOrder { start, accel: Accel::Tcg, ram: None, disk_bytes: 1 << 20 })
        }

        async fn clone_failed(&self, _: VmSize, _: &str) {}
    }

    /// Shims that are this script, which finds its folder in `$1`.
    fn shims(folder: &Path, script: &str) -> ShimProcesses {
        let shim = folder.join("shim");
        fs::write(&shim, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&shim, fs::Permissions::from_mode(0o755)).unwrap();
        let places = Places {
            shim,
            agent: "/usr/bin/agent".into(),
            qemu: "/usr/bin/qemu".into(),
            state: folder.join("state"),
            root: folder.join("root"),
            uid_base: 100_000,
            uid_count: 1000,
            most_memory_mb: 1024,
            max_vcpus: 4,
            start_timeout: Duration::from_secs(10),
        };
        ShimProcesses::new(places, Arc::new(OneTemplate)).unwrap()
    }

    fn tap() -> Link {
        Link::Tap(File::open("/dev/null").unwrap().into())
    }

    fn id() -> SandboxId {
        SandboxId::from_random(rand::random())
    }

    #[tokio::test]
    async fn a_shim_is_started_found_ended_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let script = "readlink /proc/self/fd/4; echo ready >&3; sleep 1000 & exec sleep 1000";
        let shims = shims(folder.path(), script);
        let id = id();
        assert!(!shims.is_alive(&id).await.unwrap());
        shims.start(&id, &spec("a"), tap()).await.unwrap();
        assert!(shims.is_alive(&id).await.unwrap());
        assert_eq!(shims.leftovers().await.unwrap(), std::slice::from_ref(&id));
        let order = fs::read(shims.folder(&id).join(CONFIG_FILE)).unwrap();
        let order: ShimConfig = serde_json::from_slice(&order).unwrap();
        let BoundaryConfig::Microvm(vm) = order.boundary else { panic!("a virtual machine") };
        assert_eq!((order.sandbox_id, vm.disk), (id.clone(), shims.disk(&id)));
        assert_eq!(fs::read_to_string(shims.folder(&id).join(LOG_FILE)).unwrap(), "/dev/null\n");
        fs::create_dir_all(shims.disk(&id).parent().unwrap()).unwrap();
        fs::write(shims.disk(&id), "data").unwrap();

        // The next server knows nothing but the folder.
        let next = self::shims(folder.path(), "exit 1");
        assert!(next.is_alive(&id).await.unwrap());
        let cgroup = next.cgroups(&id).unwrap().remove(0);
        next.end(&id).await.unwrap();
        assert!(!next.is_alive(&id).await.unwrap());
        assert!(cgroup.processes().unwrap().is_empty());
        assert!(!next.disk(&id).exists());
        next.end(&id).await.unwrap();
        next.forget(&id).await.unwrap();
        next.forget(&id).await.unwrap();
        assert!(next.leftovers().await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_pod_on_the_nodes_kernel_needs_no_machine_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let shims = shims(folder.path(), "ls /proc/$$/fd; echo ready >&3; exec sleep 1000");
        let id = id();
        let mut spec = spec("a");
        spec.node_namespaces = NodeNamespaces { network: true, pid: false, ipc: true };
        shims.start(&id, &spec, tap()).await.unwrap_err();
        shims.start(&id, &spec, Link::Node).await.unwrap();
        let order = fs::read(shims.folder(&id).join(CONFIG_FILE)).unwrap();
        let order: ShimConfig = serde_json::from_slice(&order).unwrap();
        let BoundaryConfig::Host(host) = order.boundary else { panic!("the node's kernel") };
        assert_eq!((host.own_network, host.own_ipc), (false, false));
        assert_eq!(host.agent, Path::new("/usr/bin/agent"));
        let log = fs::read_to_string(shims.folder(&id).join(LOG_FILE)).unwrap();
        assert!(!log.lines().any(|fd| fd == "4"), "nothing but the ready pipe: {log}");
        fs::create_dir_all(host.scratch.join("1/upper/x")).unwrap();
        shims.end(&id).await.unwrap();
        assert!(!host.scratch.exists());
        shims.forget(&id).await.unwrap();
    }

    #[tokio::test]
    async fn why_a_shim_did_not_start_stands_in_the_error() {
        let folder = tempfile::tempdir().unwrap();
        for (script, why) in [
            ("echo 'error: no such machine' >&3", "no such machine"),
            ("echo out of luck >&2; exit 1", "out of luck"),
            ("exit 1", "its log is empty"),
        ] {
            let shims = shims(folder.path(), script);
            let id = id();
            let error = shims.start(&id, &spec("a"), tap()).await.unwrap_err();
            assert!(chain(&error).contains(why), "{}", chain(&error));
            shims.end(&id).await.unwrap();
            shims.forget(&id).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_start_that_is_given_up_is_found_and_ended() {
        let folder = tempfile::tempdir().unwrap();
        let shims = shims(folder.path(), "exec sleep 1000");
        let id = id();
        let patience = Duration::from_millis(1);
        let spec = spec("a");
        let given_up = tokio::time::timeout(patience, shims.start(&id, &spec, tap())).await;
        assert!(given_up.is_err());
        shims.end(&id).await.unwrap();
        assert!(!shims.is_alive(&id).await.unwrap());
        shims.forget(&id).await.unwrap();
    }

    #[tokio::test]
    async fn a_damaged_list_of_processes_is_a_doubt_and_kills_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let shims = shims(folder.path(), "exit 1");
        let id = id();
        fs::create_dir_all(shims.folder(&id)).unwrap();
        fs::write(shims.folder(&id).join(PROCESSES_FILE), "{").unwrap();
        shims.is_alive(&id).await.unwrap_err();
        shims.end(&id).await.unwrap_err();
    }

    #[tokio::test]
    async fn the_exits_that_a_dead_shim_wrote_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let shims = shims(folder.path(), "exit 1");
        let id = id();
        let containers = shims.folder(&id).join(CONTAINERS_DIR);
        fs::create_dir_all(&containers).unwrap();
        let record = serde_json::json!({
            "version": 1, "container_id": "1".repeat(64), "phase": "exited", "created_at": 1,
            "started_at": 2, "exit": {"code": 3, "signal": 0, "exited_at": 4, "oom_killed": true},
            "guest_pid": 5, "uid": 6, "gid": 7, "groups": [8],
        });
        fs::write(containers.join("x.json"), record.to_string()).unwrap();
        fs::write(containers.join("y.json"), "damaged").unwrap();
        let states = shims.last_words(&id).await;
        assert_eq!(states.len(), 1);
        let exit = states[0].exit.unwrap();
        assert_eq!((exit.code, exit.exited_at, exit.oom_killed), (3, 4, true));
    }

    #[test]
    fn a_user_id_stays_in_its_range() {
        for first in ["00000000", "ffffffff", "00000400"] {
            let id: SandboxId = format!("{first}{}", "0".repeat(56)).parse().unwrap();
            assert!((5..15).contains(&uid(&id, 5, 10)));
        }
    }
}
