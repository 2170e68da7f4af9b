//! The shim's calls, and what it keeps between them.

use crate::{
    boundary::{Boundary, Handle},
    container::{Answer, Container, Stdin},
    disks::Disks,
    exec, guest_mounts,
    log_file::Log,
    records, resize,
    share::PodShare,
};
use a3s_box_api::{
    agent::v1 as agent,
    shim::v1::{self as shim, event, shim_server, state_response},
};
use a3s_box_failpoint as failpoint;
use a3s_box_sys::cgroup;
use a3s_box_types::{
    ContainerId,
    shim::{Accel, BoundaryConfig, ContainerExit, ContainerPhase, ContainerRecord, ShimConfig},
};
use oci_spec::runtime::Spec;
use std::{
    collections::{BTreeMap, HashSet},
    ops::Deref,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    net::UnixListener,
    sync::{mpsc, watch},
};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

/// Both outputs of ExecSync at their largest, and room for the rest.
pub const MESSAGE_MAX: usize = 48 << 20;
/// For want of descriptors, mostly: they come back.
const AFTER_A_FAILURE: Duration = Duration::from_millis(100);
/// Everything between the calls.
#[derive(Debug)]
pub struct Shim {
    folder: PathBuf,
    pub(crate) config: ShimConfig,
    pub(crate) boundary: Handle,
    share: Arc<PodShare>,
    disks: Disks,
    since: Instant,
    /// Held through ConfigureSandbox: a repeated call waits for the first one's answer.
    configured: tokio::sync::Mutex<Option<shim::ConfigureSandboxResponse>>,
    kernel_release: Mutex<String>,
    /// Held while the machine changes its size.
    pub(crate) resizing: tokio::sync::Mutex<()>,
    /// Processors that the guest uses. Changes with `resizing` held.
    pub(crate) vcpus: AtomicU32,
    containers: Mutex<BTreeMap<String, Arc<Container>>>,
    /// Held through a creation, start or removal, by container.
    turns: Mutex<BTreeMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Changes whenever an exit was recorded.
    exits: watch::Sender<u64>,
    stop: watch::Sender<bool>,
}

impl Shim {
    /// Around a boundary that is starting.
    pub fn new(
        folder: &Path,
        config: ShimConfig,
        boundary: Handle,
        share: PodShare,
        since: Instant,
        stop: watch::Sender<bool>,
    ) -> Self {
        let vcpus = resize::start_size(&config).map_or(0, |size| size.vcpus);
        Self {
            folder: folder.to_owned(),
            config,
            vcpus: vcpus.into(),
            boundary,
            share: Arc::new(share),
            disks: Disks::default(),
            since,
            configured: tokio::sync::Mutex::default(),
            kernel_release: Mutex::default(),
            resizing: tokio::sync::Mutex::default(),
            containers: Mutex::default(),
            turns: Mutex::default(),
            exits: watch::channel(0).0,
            stop,
        }
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, Status> {
        let containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        let container = containers.get(id).cloned();
        container.ok_or_else(|| Status::not_found(format!("container {id} is not in this sandbox")))
    }

    /// Carries out what changes a container: after what is being done to it, and to its end, also when the
    /// caller goes away in between. A server that restarts undoes what it does not know the end of, and must
    /// not find half of it.
    async fn in_turn<T: Send + 'static>(
        &self,
        id: &str,
        work: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<T, Status> {
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            turns.entry(id.to_owned()).or_default().clone()
        };
        let done = tokio::spawn(async move {
            let _turn = turn.lock().await;
            work.await
        });
        done.await.unwrap_or_else(|err| Err(Status::internal(format!("an order was lost: {err}"))))
    }

    fn all(&self) -> Vec<Arc<Container>> {
        let containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        containers.values().cloned().collect()
    }

    /// Shows what the guest's containers have mounted, before anybody hears of what they did.
    async fn catch_up(&self) {
        if let Some(mounts) = self.share.guest_mounts().filter(|mounts| mounts.are_possible())
            && let Ok(agent) = self.boundary.agent().await
        {
            mounts.catch_up(agent).await;
        }
    }

    fn ended(&self) -> Option<String> {
        match &*self.boundary.state.borrow() {
            Boundary::Ended(why) => Some(why.clone()),
            Boundary::Starting | Boundary::Running(_) => None,
        }
    }

    async fn end_guest_mounts(&self) {
        if let Some(mounts) = self.share.guest_mounts() {
            mounts.end().await;
        }
    }

    /// Records an end and tells whoever follows Events.
    async fn record_exit(&self, container: &Container, exit: ContainerExit) {
        if let Err(err) = container.exited(exit).await {
            tracing::error!(%err, "an exit could not be saved");
        }
        failpoint::hit("shim-exit-saved");
        self.exits.send_modify(|count| *count += 1);
    }

    async fn create(
        &self,
        request: shim::CreateContainerRequest,
    ) -> Result<shim::ContainerState, Status> {
        let order =
            request.container.ok_or_else(|| Status::invalid_argument("container is missing"))?;
        let id: ContainerId = order
            .container_id
            .parse()
            .map_err(|err| Status::invalid_argument(format!("container_id: {err}")))?;
        if let Ok(known) = self.container(id.as_str()) {
            return Ok(records::to_api(&known.record()));
        }
        let log_path = Some(request.log_path).filter(|path| !path.is_empty()).map(PathBuf::from);
        let stdin = match (request.stdin, request.stdin_once) {
            (false, _) => Stdin::None,
            (true, false) => Stdin::Open,
            (true, true) => Stdin::Once,
        };
        let made = self.make(&id, order, &request.disks, log_path, stdin).await;
        if made.is_err()
            && let Err(err) = self.unmake(id.as_str()).await
        {
            tracing::warn!(container = %id, %err, "a container that failed could not be cleaned up");
        }
        made
    }

    async fn make(
        &self,
        id: &ContainerId,
        mut order: agent::CreateContainerRequest,
        disks: &[shim::HostDisk],
        log_path: Option<PathBuf>,
        stdin: Stdin,
    ) -> Result<shim::ContainerState, Status> {
        let mut client = self.boundary.agent().await?;
        let mut spec: Spec = serde_json::from_slice(&order.oci_spec)
            .map_err(|err| Status::invalid_argument(format!("oci_spec: {err}")))?;
        let (share, owner) = (self.share.clone(), id.clone());
        // A volume may lie below what the guest itself has mounted on the host.
        (order, spec) = blocking(move || {
            order.layers = share.add_layers(&order.layers)?;
            for image in &mut order.image_mounts {
                image.layers = share.add_layers(&image.layers)?;
            }
            share.add_volumes(owner.as_str(), &mut spec)?;
            Ok((order, spec))
        })
        .await?;
        if let Some(mounts) = self.share.guest_mounts().filter(|mounts| mounts.are_possible()) {
            guest_mounts::follow(mounts, &client);
        }
        failpoint::hit("shim-container-shared");
        if !disks.is_empty() {
            let hardware = self.boundary.hardware();
            let hardware = hardware.ok_or_else(|| {
                Status::failed_precondition("there is no machine to plug disks into")
            })?;
            self.disks.add(&hardware, &mut client, id.as_str(), disks, &mut spec).await?;
        }
        order.oci_spec = serde_json::to_vec(&spec)
            .map_err(|err| Status::internal(format!("oci_spec: {err}")))?
            .into();
        let log = Log::open(log_path.clone()).await.map_err(|err| {
            Status::internal(format!(
                "open the log {}: {err}",
                log_path.unwrap_or_default().display()
            ))
        })?;
        let made = client.create_container(order).await?.into_inner();
        failpoint::hit("shim-container-made");
        let record = ContainerRecord {
            version: 1,
            container_id: id.clone(),
            phase: ContainerPhase::Created,
            created_at: records::now(),
            started_at: 0,
            exit: None,
            guest_pid: made.guest_pid,
            uid: made.uid,
            gid: made.gid,
            groups: made.groups,
            end_reason: String::new(),
        };
        let state = records::to_api(&record);
        let container = Container::adopt(self.folder.clone(), record, client, log, stdin).await?;
        failpoint::hit("shim-container-saved");
        let mut containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        containers.insert(id.to_string(), Arc::new(container));
        Ok(state)
    }

    async fn start(&self, id: String) -> Result<shim::ContainerState, Status> {
        let container = self.container(&id)?;
        let mut record = container.record();
        if record.phase == ContainerPhase::Created {
            let order = agent::StartContainerRequest { container_id: id };
            // Before any end of it, and by the host's clock, as that.
            let started_at = records::now();
            self.boundary.agent().await?.start_container(order).await?;
            failpoint::hit("shim-container-started");
            record = container
                .started(started_at)
                .map_err(|err| Status::internal(format!("save the container's record: {err}")))?;
        }
        Ok(records::to_api(&record))
    }

    /// Ends a container wherever it stands; fine when there is nothing of it.
    async fn unmake(&self, id: &str) -> Result<(), Status> {
        if self.ended().is_none() {
            let request = agent::RemoveContainerRequest { container_id: id.to_owned() };
            self.boundary.agent().await?.remove_container(request).await?;
            failpoint::hit("shim-container-removed");
            self.catch_up().await;
            if let Some(hardware) = self.boundary.hardware() {
                self.disks.remove(&hardware, id).await?;
            }
        }
        let (share, owner) = (self.share.clone(), id.to_owned());
        blocking(move || share.remove_volumes(&owner)).await?;
        records::remove_container(&self.folder, id)
            .map_err(|err| Status::internal(format!("remove the container's record: {err}")))?;
        self.containers.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        Ok(())
    }
}

/// Runs work that may wait for a disk, or for the guest, beside the runtime's thread.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Status> + Send + 'static,
) -> Result<T, Status> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|err| Status::internal(format!("blocking work: {err}")))?
}

/// Follows the agent's events and the boundary's end, for the shim's life.
pub async fn follow(shim: Arc<Shim>) {
    let mut state = shim.boundary.state.clone();
    if let Ok(client) = shim.boundary.agent().await {
        tokio::select! {
            () = follow_agent(&shim, client) => {}
            _ = state.wait_for(|state| matches!(state, Boundary::Ended(_))) => {}
        }
    }
    state.wait_for(|state| matches!(state, Boundary::Ended(_))).await.ok();
    shim.end_guest_mounts().await;
    let why = shim.ended().unwrap_or_default();
    for container in shim.all() {
        if container.record().phase != ContainerPhase::Exited {
            container.ends_with_boundary(&why);
            shim.record_exit(&container, killed_with_boundary()).await;
        }
    }
    shim.exits.send_modify(|count| *count += 1);
}

/// Lends the machine's lanes to whoever connects, for the shim's life.
pub async fn lend_lanes(shim: Arc<Shim>, listener: UnixListener) {
    loop {
        let borrower = match listener.accept().await {
            Ok((borrower, _)) => borrower,
            Err(err) => {
                tracing::warn!(%err, "a lane could not be asked for");
                tokio::time::sleep(AFTER_A_FAILURE).await;
                continue;
            }
        };
        // Where there are none, it sees the end of the connection.
        let Some(lanes) = shim.boundary.lanes() else { continue };
        tokio::spawn(async move {
            if let Err(err) = lanes.lend(borrower).await {
                tracing::debug!(%err, "a lane came back");
            }
        });
    }
}

/// The end of a container whose boundary ended under it: as if by SIGKILL.
fn killed_with_boundary() -> ContainerExit {
    let oom_killed = cgroup::own_oom_kills() > 0;
    let cause = match oom_killed {
        true => agent::ExitCause::BoundaryMemory,
        false => agent::ExitCause::Boundary,
    };
    let exited_at = records::now();
    ContainerExit { code: 137, signal: 9, exited_at, oom_killed, cause: cause.into() }
}

async fn follow_agent(
    shim: &Arc<Shim>,
    mut client: agent::agent_client::AgentClient<tonic::transport::Channel>,
) {
    let mut events = match client.events(agent::EventsRequest {}).await {
        Ok(events) => events.into_inner(),
        Err(err) => return tracing::error!(%err, "the agent's events cannot be followed"),
    };
    while let Some(Ok(event)) = events.next().await {
        let Some(agent::event::Kind::ContainerExited(exited)) = event.kind else {
            continue;
        };
        let Ok(container) = shim.container(&exited.container_id) else {
            continue;
        };
        let exit = records::exit_from(&exited.exit.unwrap_or_default());
        let shim = shim.clone();
        // One container's last output must not hold up another's end.
        tokio::spawn(async move {
            shim.catch_up().await;
            shim.record_exit(&container, exit).await;
        });
    }
}

/// Tells one follower of Events what has happened and what happens, to the boundary's end.
async fn tell(
    shim: Arc<Shim>,
    mut changes: watch::Receiver<u64>,
    events: mpsc::Sender<Result<shim::Event, Status>>,
) {
    let mut told = HashSet::new();
    loop {
        changes.borrow_and_update();
        let ended = shim.ended();
        for container in shim.all() {
            let record = container.record();
            if record.phase == ContainerPhase::Exited && told.insert(record.container_id.clone()) {
                let kind = event::Kind::ContainerExited(records::to_api(&record));
                if events.send(Ok(shim::Event { kind: Some(kind) })).await.is_err() {
                    return;
                }
            }
        }
        let all_ended = shim.all().iter().all(|one| one.record().phase == ContainerPhase::Exited);
        if let Some(why) = ended
            && all_ended
        {
            let kind = event::Kind::BoundaryEnded(why);
            // The follower may have gone; this was the last event anyway.
            events.send(Ok(shim::Event { kind: Some(kind) })).await.ok();
            return;
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = events.closed() => return,
        }
    }
}

/// A caller's messages as they come; a broken connection is their end.
fn relayed<T: Send + 'static>(inputs: Streaming<T>) -> impl Stream<Item = T> + Send + 'static {
    inputs.map_while(Result::ok)
}

/// An error and its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// The shim's calls.
#[derive(Debug)]
pub struct Service(pub Arc<Shim>);

impl Deref for Service {
    type Target = Shim;

    fn deref(&self) -> &Shim {
        &self.0
    }
}

#[tonic::async_trait]
impl shim_server::Shim for Service {
    async fn configure_sandbox(
        &self,
        request: Request<shim::ConfigureSandboxRequest>,
    ) -> Result<Response<shim::ConfigureSandboxResponse>, Status> {
        let mut configured = self.configured.lock().await;
        if let Some(answer) = &*configured {
            return Ok(Response::new(answer.clone()));
        }
        let mut sandbox = request
            .into_inner()
            .sandbox
            .ok_or_else(|| Status::invalid_argument("sandbox is missing"))?;
        let mut client = self.boundary.agent().await?;
        let mut entropy = vec![0; 64];
        let filled = rustix::rand::getrandom(&mut entropy, rustix::rand::GetRandomFlags::empty());
        filled.map_err(|err| Status::internal(format!("draw entropy: {err}")))?;
        sandbox.entropy = entropy.into();
        sandbox.now_unix_nanos = records::now();
        let rehearsal = sandbox.rehearsal;
        let made = client.configure_sandbox(sandbox).await?.into_inner();
        failpoint::hit("shim-configured");
        self.boundary.reached("configured", self.since);
        self.kernel_release
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone_from(&made.kernel_release);
        let answer = shim::ConfigureSandboxResponse {
            kernel_release: made.kernel_release,
            stages_ms: self.boundary.stages(),
        };
        if !rehearsal {
            *configured = Some(answer.clone());
        }
        Ok(Response::new(answer))
    }

    async fn state(
        &self,
        _request: Request<shim::StateRequest>,
    ) -> Result<Response<shim::StateResponse>, Status> {
        let memory_mb = self.memory_mb().await;
        let (boundary, end_reason) = match &*self.boundary.state.borrow() {
            Boundary::Starting => (state_response::Boundary::Starting, String::new()),
            Boundary::Running(_) => (state_response::Boundary::Running, String::new()),
            Boundary::Ended(why) => (state_response::Boundary::Ended, why.clone()),
        };
        let accel = match &self.config.boundary {
            BoundaryConfig::Microvm(config) => match config.vm.accel {
                Accel::Kvm => "kvm",
                Accel::Tcg => "tcg",
            },
            BoundaryConfig::Host(_) => "",
        };
        Ok(Response::new(shim::StateResponse {
            boundary: boundary.into(),
            end_reason,
            containers: self.all().iter().map(|one| records::to_api(&one.record())).collect(),
            pid: self.boundary.pid(),
            kernel_release: self
                .kernel_release
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
            stages_ms: self.boundary.stages(),
            accel: accel.to_owned(),
            console_tail: self.boundary.console_tail(),
            clone_failed: self.boundary.clone_failed(),
            memory_mb,
            vcpus: self.vcpus.load(Ordering::Relaxed),
        }))
    }

    async fn create_container(
        &self,
        request: Request<shim::CreateContainerRequest>,
    ) -> Result<Response<shim::CreateContainerResponse>, Status> {
        let (shim, request) = (self.0.clone(), request.into_inner());
        let id = request.container.as_ref().map(|order| order.container_id.clone());
        let made = async move { shim.create(request).await };
        let state = Some(self.in_turn(&id.unwrap_or_default(), made).await?);
        Ok(Response::new(shim::CreateContainerResponse { state }))
    }

    async fn start_container(
        &self,
        request: Request<shim::StartContainerRequest>,
    ) -> Result<Response<shim::StartContainerResponse>, Status> {
        let (shim, id) = (self.0.clone(), request.into_inner().container_id);
        let order = id.clone();
        let state = Some(self.in_turn(&id, async move { shim.start(order).await }).await?);
        Ok(Response::new(shim::StartContainerResponse { state }))
    }

    async fn signal_container(
        &self,
        request: Request<shim::SignalContainerRequest>,
    ) -> Result<Response<shim::SignalContainerResponse>, Status> {
        let request = request.into_inner();
        let container = self.container(&request.container_id)?;
        if container.record().phase != ContainerPhase::Exited {
            let order = agent::SignalContainerRequest {
                container_id: request.container_id,
                signal: request.signal,
                all: request.all,
            };
            self.boundary.agent().await?.signal_container(order).await?;
        }
        Ok(Response::new(shim::SignalContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<shim::RemoveContainerRequest>,
    ) -> Result<Response<shim::RemoveContainerResponse>, Status> {
        let (shim, id) = (self.0.clone(), request.into_inner().container_id);
        let order = id.clone();
        self.in_turn(&id, async move { shim.unmake(&order).await }).await?;
        Ok(Response::new(shim::RemoveContainerResponse {}))
    }

    async fn reopen_log(
        &self,
        request: Request<shim::ReopenLogRequest>,
    ) -> Result<Response<shim::ReopenLogResponse>, Status> {
        let container = self.container(&request.into_inner().container_id)?;
        container
            .reopen_log()
            .await
            .map_err(|err| Status::failed_precondition(format!("reopen the log: {err}")))?;
        Ok(Response::new(shim::ReopenLogResponse {}))
    }

    async fn exec_sync(
        &self,
        request: Request<shim::ExecSyncRequest>,
    ) -> Result<Response<shim::ExecSyncResponse>, Status> {
        let request = request.into_inner();
        self.container(&request.container_id)?;
        let client = self.boundary.agent().await?;
        let answer = exec::run(client, request).await;
        self.catch_up().await;
        Ok(Response::new(answer?))
    }

    type EventsStream = ReceiverStream<Result<shim::Event, Status>>;

    async fn events(
        &self,
        _request: Request<shim::EventsRequest>,
    ) -> Result<Response<Self::EventsStream>, Status> {
        let (events, receiver) = mpsc::channel(16);
        let mut changes = self.exits.subscribe();
        changes.mark_changed();
        tokio::spawn(tell(self.0.clone(), changes, events));
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn update_container(
        &self,
        request: Request<agent::UpdateContainerRequest>,
    ) -> Result<Response<agent::UpdateContainerResponse>, Status> {
        let request = request.into_inner();
        self.container(&request.container_id)?;
        self.boundary.agent().await?.update_container(request).await
    }

    async fn resize(
        &self,
        request: Request<shim::ResizeRequest>,
    ) -> Result<Response<shim::ResizeResponse>, Status> {
        let (shim, request) = (self.0.clone(), request.into_inner());
        // A task of its own: what was begun is not left half done when the caller gives up.
        let resized = tokio::spawn(async move { resize::resize(&shim, request).await }).await;
        let resized = resized.map_err(|err| Status::internal(format!("resize: {err}")))?;
        Ok(Response::new(resized?))
    }

    async fn stats(
        &self,
        request: Request<shim::StatsRequest>,
    ) -> Result<Response<shim::StatsResponse>, Status> {
        let shim::StatsRequest { container_ids, detailed } = request.into_inner();
        let request = agent::StatsRequest { container_ids, detailed };
        let guest = self.boundary.agent().await?.stats(request).await?.into_inner();
        let used = self.boundary.usage();
        let used = used.map_err(|err| Status::internal(format!("read the pod's cgroup: {err}")))?;
        Ok(Response::new(shim::StatsResponse {
            guest: Some(guest),
            host_cpu_ns: used.cpu_ns,
            host_memory_bytes: used.memory_bytes,
            host_processes: used.processes,
            host_page_faults: used.page_faults,
            host_major_page_faults: used.major_page_faults,
        }))
    }

    type ExecStream = Streaming<agent::ExecOutput>;

    async fn exec(
        &self,
        request: Request<Streaming<agent::ExecInput>>,
    ) -> Result<Response<Self::ExecStream>, Status> {
        let inputs = relayed(request.into_inner());
        self.boundary.agent().await?.exec(inputs).await
    }

    type AttachStream = ReceiverStream<Answer>;

    async fn attach(
        &self,
        request: Request<Streaming<shim::AttachInput>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let mut inputs = request.into_inner();
        let first = inputs.message().await?;
        let first = first.ok_or_else(|| Status::invalid_argument("no container was named"))?;
        let answers = self.container(&first.container_id)?.attach(first, inputs)?;
        Ok(Response::new(ReceiverStream::new(answers)))
    }

    type PortForwardStream = Streaming<agent::PortOutput>;

    async fn port_forward(
        &self,
        request: Request<Streaming<agent::PortInput>>,
    ) -> Result<Response<Self::PortForwardStream>, Status> {
        let inputs = relayed(request.into_inner());
        self.boundary.agent().await?.port_forward(inputs).await
    }

    async fn shutdown(
        &self,
        _request: Request<shim::ShutdownRequest>,
    ) -> Result<Response<shim::ShutdownResponse>, Status> {
        self.boundary.end().await;
        failpoint::hit("shim-boundary-ended");
        self.end_guest_mounts().await;
        self.stop.send_replace(true);
        Ok(Response::new(shim::ShutdownResponse {}))
    }
}
