//! One container, from CreateContainer to RemoveContainer.
//!
//! ```text
//! Created --start--> Running --init ends--> Exited
//!     \______________init ends______________^
//! ```
//!
//! When init ends, everything else in the container is killed first and the exit told after, so
//! whoever hears of it finds no process and reads outputs that come to their end.

use crate::{
    agent::{Agent, blocking},
    cgroup::Cgroup,
    child::OWNED_BY_POD,
    config::Boundary,
    error::{Error, Step},
    launcher::Descriptors,
    limits, mounts,
    plan::{ContainerPlan, IdMap, Inner, Mount, MountKind, Plan, Process, User, WantedUser},
    pod_limit,
    reaper::Ended,
    seccomp_filter::Filter,
    spawn::Gate,
    spec,
    streams::{self, Stdin, Streams},
};
use a3s_box_api::agent::v1 as api;
use a3s_box_sys::{clone3::namespace, mount_attr::flag, signal};
use a3s_box_types::ContainerId;
use oci_spec::runtime::LinuxResources;
use rustix::{
    fd::{AsFd, OwnedFd},
    process::{Pid, Signal},
};
use std::{
    fs, io,
    os::unix::fs::chown,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::{Mutex as AsyncMutex, oneshot, watch};

/// How long dead processes may take to be gone.
const GONE: Duration = Duration::from_secs(30);

/// Where a container stands.
#[derive(Debug, Clone, PartialEq)]
pub enum State {
    /// Init waits before its exec.
    Created,
    /// Init runs.
    Running,
    /// Nothing runs any more.
    Exited(api::Exit),
}

/// A container.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// Init.
    pub init: OwnedFd,
    /// Init's program; what stands around it is every exec's, too.
    pub process: Process,
    /// Who its processes run as.
    pub user: User,
    /// Namespaces an exec joins.
    pub namespaces: u64,
    /// The ids of its user namespace, if that is not the guest's.
    pub ids: Option<IdMap>,
    /// What its processes may ask the kernel for.
    pub filter: Option<Filter>,
    state: watch::Sender<State>,
    gate: AsyncMutex<Option<Gate>>,
    streams: Mutex<Option<Streams>>,
    files: Files,
    execs: AtomicU64,
}

/// What has to be undone when a container goes.
#[derive(Debug, Clone)]
struct Files {
    container: String,
    layers: Vec<String>,
    scratch: PathBuf,
    upper: PathBuf,
    cgroup: Cgroup,
}

/// Creates a container with its init stopped before exec.
pub async fn create(
    agent: &Arc<Agent>,
    request: api::CreateContainerRequest,
) -> Result<api::CreateContainerResponse, Error> {
    let id = request.container_id.clone();
    id.parse::<ContainerId>().map_err(|error| Error::invalid(error.to_string()))?;
    agent.reserve(&id)?;
    let made = make(agent, request).await;
    let (container, response) = match made {
        Ok((container, response)) => (Some(container), Ok(response)),
        Err(error) => (None, Err(error)),
    };
    agent.settle(&id, container);
    response
}

async fn make(
    agent: &Arc<Agent>,
    request: api::CreateContainerRequest,
) -> Result<(Arc<Container>, api::CreateContainerResponse), Error> {
    let id = request.container_id.clone();
    let sandbox =
        agent.sandbox().ok_or_else(|| Error::NotNow("the sandbox is not configured".to_owned()))?;
    let pid_namespace = match request.pid_mode() {
        api::PidMode::Container => PidNamespace::New,
        api::PidMode::Node if agent.config.boundary == Boundary::Host => PidNamespace::Node,
        api::PidMode::Node => {
            return Err(Error::Unsupported("the node's PID namespace in a guest".to_owned()));
        }
        api::PidMode::Pod => {
            let pause = sandbox.pid_namespace.as_ref();
            let missing = || Error::NotNow("the sandbox has no shared PID namespace".to_owned());
            PidNamespace::Of(pause.ok_or_else(missing)?.try_clone().step("PID namespace")?)
        }
        api::PidMode::Target => {
            let target = agent.container(&request.pid_target)?;
            PidNamespace::Of(target.init.try_clone().step("PID namespace")?)
        }
    };
    let mut files = Files {
        container: id.clone(),
        layers: Vec::new(),
        scratch: agent.config.scratch.join(&id),
        upper: agent.config.scratch.join(&id).join("upper"),
        cgroup: Cgroup::new(&agent.config, &id),
    };
    let preparing = Arc::clone(agent);
    let (mut files, prepared) = blocking(move || {
        let prepared = prepare(&preparing, request, &mut files);
        Ok((files, prepared))
    })
    .await?;
    let made = match prepared {
        Ok(prepared) => first_process(agent, &id, prepared, pid_namespace, &mut files).await,
        Err(error) => Err(error),
    };
    if made.is_err() {
        // What failed is the answer; what cannot be undone now is undone by RemoveContainer's like.
        if let Err(error) = undo(agent, files).await {
            crate::log::error(format_args!("container {id}: undo: {error}"));
        }
    }
    made
}

/// Where init's PID namespace comes from.
enum PidNamespace {
    /// It is made for it.
    New,
    /// It is the agent's own.
    Node,
    /// It is this process's.
    Of(OwnedFd),
}

struct Prepared {
    plan: ContainerPlan,
    filter: Option<Filter>,
    namespaces: u64,
    cgroup: OwnedFd,
}

/// All that blocks: mounts layers, makes folders and the cgroup, compiles seccomp.
fn prepare(
    agent: &Agent,
    request: api::CreateContainerRequest,
    files: &mut Files,
) -> Result<Prepared, Error> {
    let mut spec = spec::read(&request.oci_spec, &agent.config)?;
    if spec.ids != agent.user_namespace().map(|namespace| namespace.ids) {
        return Err(Error::invalid("oci_spec: its user namespace is not the sandbox's"));
    }
    if request.layers.is_empty() {
        return Err(Error::invalid("layers is empty"));
    }
    let filter = spec.seccomp.as_ref().map(|profile| agent.filters.get(profile)).transpose()?;
    files.cgroup.create()?;
    files.cgroup.limit(&spec.limits, agent.device_rules.get(&spec.rules)?.as_fd())?;
    if let Some(bytes) = spec.huge_pages {
        agent.huge_pages.hold(&files.container, bytes)?;
    }
    let huge = agent.config.huge_pages();
    for mount in &spec.mounts {
        if let MountKind::Bind { source, .. } = &mount.kind
            && source.starts_with(&huge)
        {
            agent.huge_pages.mount(source)?;
        }
    }
    let mut acquire = |names: &[String]| -> Result<Vec<PathBuf>, Error> {
        let mut layers = Vec::with_capacity(names.len());
        for name in names {
            layers.push(agent.layers.acquire(name)?);
            files.layers.push(name.clone());
        }
        layers.reverse();
        Ok(layers)
    };
    let layers = acquire(&request.layers)?;
    for image in &request.image_mounts {
        let shown = acquire(&image.layers)?;
        mounts::show_image(&mut spec.mounts, &image.destination, shown, &image.sub_path)?;
    }
    let (upper, work) = (files.upper.clone(), files.scratch.join("work"));
    for folder in [&upper, &work] {
        fs::create_dir_all(folder).step(format_args!("writable layer {}", folder.display()))?;
    }
    if let Some(ids) = spec.ids {
        chown(&upper, Some(ids.uid), Some(ids.gid)).step("writable layer")?;
        // Who may write there is also to have something to write.
        let writable = |mount: &Mount| {
            matches!(&mount.kind, MountKind::New { kind, .. } if kind == "cgroup2")
                && mount.changes.iter().all(|change| change.set & flag::RDONLY == 0)
        };
        if spec.mounts.iter().any(writable) {
            files.cgroup.give(ids.uid, ids.gid)?;
        }
    }
    spec.process.seccomp_flags = filter.as_ref().map_or(0, |filter| filter.flags);
    Ok(Prepared {
        cgroup: files.cgroup.open()?,
        namespaces: spec.namespaces,
        filter,
        plan: ContainerPlan {
            cgroup_doors: files.cgroup.doors(),
            inner: spec.ids.map(|ids| Inner { ids, namespaces: spec.namespaces }),
            staging: agent.config.staging(),
            layers,
            upper,
            work,
            readonly_root: spec.readonly_root,
            root_propagation: spec.root_propagation,
            mounts: spec.mounts,
            standard_devices: spec.standard_devices,
            devices: spec.devices,
            masked: spec.masked,
            readonly: spec.readonly,
            hostname: spec.hostname,
            domainname: spec.domainname,
            sysctls: spec.sysctls,
            loopback: spec.namespaces & namespace::NET != 0,
            user: wanted_user(request.user.unwrap_or_default()),
            process: spec.process,
        },
    })
}

fn wanted_user(user: api::User) -> WantedUser {
    let api::User { user, uid, gid, supplemental_groups, strict_groups } = user;
    WantedUser { user, uid, gid, supplemental_groups, strict_groups }
}

async fn first_process(
    agent: &Arc<Agent>,
    id: &str,
    prepared: Prepared,
    pid_namespace: PidNamespace,
    files: &mut Files,
) -> Result<(Arc<Container>, api::CreateContainerResponse), Error> {
    let Prepared { plan, filter, namespaces, cgroup } = prepared;
    let process = plan.process.clone();
    let ids = plan.inner.as_ref().map(|inner| inner.ids);
    let (stdio, streams) = if process.terminal {
        (Default::default(), None)
    } else {
        let (stdio, streams) = streams::pipes(Stdin::Open)?;
        (stdio, Some(streams))
    };
    let (new_pid, pid_namespace) = match pid_namespace {
        PidNamespace::New => (namespace::PID, None),
        PidNamespace::Node => (0, None),
        PidNamespace::Of(process) => (0, Some(process)),
    };
    let pod = agent.user_namespace();
    // Inside a user namespace the process makes the rest by itself.
    let (first, all) = match pod {
        Some(_) => (namespace::MOUNT, namespaces | namespace::USER | OWNED_BY_POD),
        None => (namespaces | new_pid, namespaces),
    };
    let descriptors = Descriptors {
        stdio,
        seccomp: duplicate(filter.as_ref())?,
        pid_namespace,
        target: duplicate_fd(pod.map(|pod| &pod.pidfd))?,
        user_namespace: duplicate_fd(pod.map(|pod| &pod.file))?,
        cgroup: Some(cgroup),
        node_mounts: duplicate_fd(agent.node_mounts.as_ref())?,
        ..Descriptors::default()
    };
    let plan = Plan::Container(Box::new(plan));
    let init = agent.spawn(&plan, first, descriptors).await?;
    let streams = match (streams, init.terminal) {
        (Some(streams), _) => streams,
        (None, Some(master)) => streams::terminal(master)?,
        (None, None) => return Err(Error::NotNow("the container has no terminal".to_owned())),
    };
    let response = api::CreateContainerResponse {
        guest_pid: init.pid.as_raw_nonzero().get() as u32,
        uid: init.user.uid,
        gid: init.user.gid,
        groups: init.user.groups.clone(),
    };
    let container = Arc::new(Container {
        id: id.to_owned(),
        cgroup: files.cgroup.clone(),
        init: init.pidfd,
        process,
        user: init.user,
        namespaces: all | namespace::CGROUP,
        ids,
        filter,
        state: watch::Sender::new(State::Created),
        gate: AsyncMutex::new(Some(init.gate)),
        streams: Mutex::new(Some(streams)),
        files: files.clone(),
        execs: AtomicU64::new(0),
    });
    tokio::spawn(follow(Arc::clone(agent), Arc::clone(&container), init.ended));
    tokio::spawn(follow_memory(Arc::clone(agent), Arc::clone(&container)));
    Ok((container, response))
}

/// A filter's program for one more child.
pub fn duplicate(filter: Option<&Filter>) -> Result<Option<OwnedFd>, Error> {
    duplicate_fd(filter.map(|filter| &*filter.program))
}

fn duplicate_fd(fd: Option<&OwnedFd>) -> Result<Option<OwnedFd>, Error> {
    fd.map(OwnedFd::try_clone).transpose().step("a descriptor for the process")
}

/// Tells init's end, after everything else in the container has ended too.
async fn follow(agent: Arc<Agent>, container: Arc<Container>, ended: oneshot::Receiver<Ended>) {
    let Ok(ended) = ended.await else { return };
    if let Err(error) = empty(&agent, &container.cgroup).await {
        crate::log::error(format_args!("container {}: {error}", container.id));
    }
    // Nobody is left to serve them, and the host is to see them go before it hears of the end.
    if let Err(error) = agent.volume_mounts.end(&container.id).await {
        crate::log::error(format_args!("container {}: {error}", container.id));
    }
    let cause = pod_limit::cause_of_end(&agent.config, &container.cgroup);
    let exit = api::Exit {
        code: ended.code,
        signal: ended.signal,
        exited_at: ended.at,
        oom_killed: cause != api::ExitCause::Process,
        cause: cause.into(),
    };
    container.state.send_replace(State::Exited(exit));
    agent.events.publish(api::event::Kind::ContainerExited(api::ContainerExited {
        container_id: container.id.clone(),
        exit: Some(exit),
    }));
}

/// Tells once when a process of the container was killed for want of memory.
async fn follow_memory(agent: Arc<Agent>, container: Arc<Container>) {
    let mut state = container.state.subscribe();
    // Without a memory controller nobody is killed by it.
    let Ok(watched) = agent.watcher.watch(&container.cgroup.file("memory.events")) else {
        return;
    };
    loop {
        let over = matches!(*state.borrow_and_update(), State::Exited(_));
        if container.cgroup.oom_kills() > 0 {
            let container_id = container.id.clone();
            return agent
                .events
                .publish(api::event::Kind::ContainerOom(api::ContainerOom { container_id }));
        }
        if over {
            return;
        }
        tokio::select! {
            () = watched.changed() => {}
            changed = state.changed() => if changed.is_err() { return },
        }
    }
}

/// Kills everything in a cgroup and returns when it is gone.
pub async fn empty(agent: &Agent, cgroup: &Cgroup) -> Result<(), Error> {
    if !cgroup.populated() {
        return Ok(());
    }
    let watched = match agent.watcher.watch(&cgroup.file("cgroup.events")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        watched => watched.step("watch the cgroup")?,
    };
    cgroup.kill()?;
    let gone = async {
        while cgroup.populated() {
            watched.changed().await;
        }
    };
    tokio::time::timeout(GONE, gone)
        .await
        .map_err(|_| Error::NotNow("its processes do not go although they were killed".to_owned()))
}

/// Lets init exec.
pub async fn start(agent: &Agent, id: &str) -> Result<api::StartContainerResponse, Error> {
    let container = agent.container(id)?;
    let mut gate = container.gate.lock().await;
    let Some(gate) = gate.take() else {
        return Err(Error::NotNow(format!("container {id} was started before")));
    };
    gate.open().await?;
    container.state.send_if_modified(|state| {
        let created = *state == State::Created;
        if created {
            *state = State::Running;
        }
        created
    });
    Ok(api::StartContainerResponse {})
}

/// Puts other limits in force.
pub async fn update(
    agent: &Arc<Agent>,
    request: api::UpdateContainerRequest,
) -> Result<api::UpdateContainerResponse, Error> {
    let container = agent.container(&request.container_id)?;
    let resources: LinuxResources = serde_json::from_slice(&request.resources)
        .map_err(|error| Error::invalid(format!("resources: {error}")))?;
    let limits = limits::read(Some(&resources))?;
    let huge_pages = spec::huge_pages(Some(&resources), &agent.config)?;
    let agent = Arc::clone(agent);
    blocking(move || {
        if let Some(bytes) = huge_pages {
            agent.huge_pages.hold(&container.id, bytes)?;
        }
        container.cgroup.update(&limits)
    })
    .await?;
    Ok(api::UpdateContainerResponse {})
}

/// Signals init, or everything in the container.
pub fn send_signal(agent: &Agent, request: &api::SignalContainerRequest) -> Result<(), Error> {
    let container = agent.container(&request.container_id)?;
    let signal = i32::try_from(request.signal).ok().filter(|number| (1..=64).contains(number));
    let signal = signal.ok_or_else(|| Error::invalid(format!("signal {}", request.signal)))?;
    if !request.all {
        return signal::send(container.init.as_fd(), signal).step("signal");
    }
    if signal == Signal::KILL.as_raw() {
        return container.cgroup.kill();
    }
    for pid in container.cgroup.processes().step("signal")? {
        // A pid may be gone by now, but not another's: pids are given out in turn.
        if let Some(pid) = Pid::from_raw(pid) {
            signal::send_to(pid, signal).step("signal")?;
        }
    }
    Ok(())
}

/// Ends and undoes a container. OK when there is none.
pub async fn remove(agent: &Arc<Agent>, id: &str) -> Result<(), Error> {
    let Some(container) = agent.take(id)? else {
        return Ok(());
    };
    let result = dismantle(agent, &container).await;
    // What could not be undone is there for the next try.
    agent.settle(id, result.is_err().then_some(container));
    if result.is_ok() {
        agent.events.forget(id);
    }
    result
}

async fn dismantle(agent: &Arc<Agent>, container: &Container) -> Result<(), Error> {
    drop(container.gate.lock().await.take());
    container.cgroup.kill()?;
    let mut state = container.state.subscribe();
    let exited = state.wait_for(|state| matches!(state, State::Exited(_)));
    tokio::time::timeout(GONE, exited)
        .await
        .map_err(|_| Error::NotNow("init does not go although it was killed".to_owned()))?
        .map_err(io::Error::other)
        .step("wait for init")?;
    undo(agent, container.files.clone()).await
}

/// The one way to take a container's things away. May be repeated.
async fn undo(agent: &Arc<Agent>, files: Files) -> Result<(), Error> {
    empty(agent, &files.cgroup).await?;
    let agent = Arc::clone(agent);
    blocking(move || {
        files.cgroup.remove()?;
        agent.huge_pages.hold(&files.container, 0)?;
        match fs::remove_dir_all(&files.scratch) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result.step(format_args!("remove {}", files.scratch.display()))?,
        }
        for layer in &files.layers {
            agent.layers.release(layer)?;
        }
        Ok(())
    })
    .await
}

impl Container {
    /// The folder of its writable layer.
    pub fn writable(&self) -> &Path {
        &self.files.upper
    }

    /// How it stands.
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// Init's streams, once.
    pub fn take_streams(&self) -> Result<Streams, Error> {
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        streams
            .take()
            .ok_or_else(|| Error::NotNow(format!("the streams of container {} are taken", self.id)))
    }

    /// A cgroup for one more exec.
    pub fn exec_cgroup(&self) -> Cgroup {
        self.cgroup.child(&format!("exec-{}", self.execs.fetch_add(1, Ordering::Relaxed)))
    }

    /// Init's PID namespace and the rest.
    pub fn target(&self) -> Result<OwnedFd, Error> {
        self.init.as_fd().try_clone_to_owned().step("the container's namespaces")
    }
}
