//! A fake host: namespaces and shims are entries of sets, each shim answers on a real socket.
//!
//! Every outside call counts twice, before and after its effect. The host can be made to die at the
//! n-th of these points (the call then never returns, as for a killed server) or to fail at one.

use super::{
    Deps, Events, SandboxError,
    network::{Link, Network},
    record::NetworkStatus,
    shims::Shims,
    spares::Spares,
    spec::SandboxSpec,
};
use crate::shim_client::ShimClient;
use a3s_box_api::{
    agent::v1 as agent,
    shim::v1::{
        self as shim, container_state::Phase, event::Kind, shim_server, state_response::Boundary,
    },
};
use a3s_box_store::Store;
use a3s_box_types::{SandboxId, network::GuestNetwork};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Debug,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
};
use tokio::{net::UnixListener, sync::broadcast};
use tokio_stream::{
    Stream, StreamExt,
    wrappers::{BroadcastStream, UnixListenerStream},
};
use tonic::{Request, Response, Status, Streaming};

pub(crate) struct FakeHost {
    pub(crate) folder: tempfile::TempDir,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    netns: BTreeSet<SandboxId>,
    ips: BTreeSet<SandboxId>,
    folders: BTreeSet<SandboxId>,
    spares: BTreeSet<SandboxId>,
    shims: BTreeMap<SandboxId, FakeShim>,
    steps_left: Option<usize>,
    failing: BTreeMap<&'static str, usize>,
    doubt: bool,
    bad_clone: bool,
    dead_guest: Option<String>,
}

struct FakeShim {
    state: Arc<ShimState>,
    runtime: tokio::runtime::Runtime,
}

/// What is there of the outside: namespaces, addresses, folders, shims.
pub(crate) type Census = (usize, usize, usize, usize);

impl FakeHost {
    pub(crate) fn new() -> Arc<Self> {
        // Records are synced often, which costs nothing in memory.
        let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        Arc::new(Self { folder, inner: Mutex::default() })
    }

    /// What a server started on this host works with.
    pub(crate) fn deps(self: &Arc<Self>) -> Deps {
        Deps {
            store: Store::open(self.folder.path().join("sandboxes")).unwrap(),
            network: self.clone(),
            shims: self.clone(),
            spares: Spares::none(),
            boot_id: "boot-1".to_owned(),
            instruments: Arc::default(),
            events: Arc::new(Events::open(self.folder.path().join("told")).unwrap()),
        }
    }

    pub(crate) fn census(&self) -> Census {
        let inner = self.lock();
        (inner.netns.len(), inner.ips.len(), inner.folders.len(), inner.shims.len())
    }

    pub(crate) fn die_after(&self, steps: usize) {
        self.lock().steps_left = Some(steps);
    }

    pub(crate) fn revive(&self) {
        self.lock().steps_left = None;
    }

    /// The next `times` calls of this step fail.
    pub(crate) fn fail(&self, step: &'static str, times: usize) {
        self.lock().failing.insert(step, times);
    }

    /// The next guest that does not answer is one whose template was of no use.
    pub(crate) fn clone_fails(&self) {
        self.lock().bad_clone = true;
    }

    /// The next guest ends before anybody talks to it, for this reason.
    pub(crate) fn guest_ends(&self, why: &str) {
        self.lock().dead_guest = Some(why.to_owned());
    }

    /// Whether a shim lives can not be told.
    pub(crate) fn doubt(&self, doubt: bool) {
        self.lock().doubt = doubt;
    }

    /// The shim's process is killed.
    pub(crate) fn kill_shim(&self, id: &SandboxId) {
        let killed = self.lock().shims.remove(id);
        if let Some(shim) = killed {
            shim.runtime.shutdown_background();
        }
        drop(std::fs::remove_file(self.socket(id)));
    }

    /// Its socket is there and nobody answers.
    pub(crate) fn mute_shim(&self, id: &SandboxId) {
        std::fs::rename(self.socket(id), self.socket(id).with_extension("muted")).unwrap();
    }

    pub(crate) fn unmute_shim(&self, id: &SandboxId) {
        std::fs::rename(self.socket(id).with_extension("muted"), self.socket(id)).unwrap();
    }

    pub(crate) fn shim(&self, id: &SandboxId) -> Arc<ShimState> {
        self.lock().shims[id].state.clone()
    }

    pub(crate) fn add_netns(&self, id: &SandboxId) {
        self.lock().netns.insert(id.clone());
    }

    fn socket(&self, id: &SandboxId) -> PathBuf {
        // Socket paths are short: the first digits are enough here.
        self.folder.path().join(id.short())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// Dies, fails or goes on.
    async fn step(&self, name: &'static str) -> Result<(), SandboxError> {
        let dead = {
            let mut inner = self.lock();
            match &mut inner.steps_left {
                Some(0) => true,
                Some(left) => {
                    *left -= 1;
                    false
                }
                None => false,
            }
        };
        if dead {
            std::future::pending::<()>().await;
        }
        match self.lock().failing.get_mut(name) {
            Some(times) if *times > 0 => {
                *times -= 1;
                Err(SandboxError::step(name, "it was told to fail"))
            }
            _ => Ok(()),
        }
    }

    fn start_shim(&self, id: &SandboxId) {
        let state = Arc::new(ShimState::new());
        *state.ended.lock().unwrap() = self.lock().dead_guest.take();
        let service = shim_server::ShimServer::new(Answers(state.clone()));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let _inside = runtime.enter();
        let listener = UnixListener::bind(self.socket(id)).unwrap();
        runtime.spawn(
            tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(UnixListenerStream::new(listener)),
        );
        drop(_inside);
        self.lock().shims.insert(id.clone(), FakeShim { state, runtime });
    }
}

impl Drop for FakeHost {
    fn drop(&mut self) {
        for (_, shim) in std::mem::take(&mut self.lock().shims) {
            shim.runtime.shutdown_background();
        }
    }
}

#[tonic::async_trait]
impl Network for FakeHost {
    async fn prepare(&self, id: &SandboxId, _: &SandboxSpec) -> Result<Link, SandboxError> {
        self.step("prepare").await?;
        self.lock().netns.insert(id.clone());
        self.step("prepared").await?;
        Ok(Link::Tap(std::fs::File::open("/dev/null").unwrap().into()))
    }

    async fn attach(&self, id: &SandboxId, _: &SandboxSpec) -> Result<NetworkStatus, SandboxError> {
        self.step("attach").await?;
        self.lock().ips.insert(id.clone());
        self.step("attached").await?;
        let ips = vec!["10.0.0.2".parse().unwrap()];
        Ok(NetworkStatus { interface: "eth0".to_owned(), ips })
    }

    async fn join(
        &self,
        _: &SandboxId,
        _: &SandboxSpec,
        _: &NetworkStatus,
    ) -> Result<GuestNetwork, SandboxError> {
        self.step("join").await?;
        Ok(GuestNetwork::default())
    }

    async fn teardown(&self, id: &SandboxId, _: &SandboxSpec) -> Result<(), SandboxError> {
        self.step("detach").await?;
        self.lock().ips.remove(id);
        self.step("detached").await?;
        self.lock().netns.remove(id);
        Ok(())
    }

    async fn leftovers(&self) -> Result<Vec<SandboxId>, SandboxError> {
        Ok(self.lock().netns.iter().cloned().collect())
    }
}

#[tonic::async_trait]
impl Shims for FakeHost {
    async fn start(&self, id: &SandboxId, _: &SandboxSpec, _: Link) -> Result<(), SandboxError> {
        self.step("start").await?;
        self.lock().folders.insert(id.clone());
        self.step("folder").await?;
        self.start_shim(id);
        self.step("started").await
    }

    async fn start_spare(
        &self,
        id: &SandboxId,
        spec: &SandboxSpec,
        link: Link,
    ) -> Result<(), SandboxError> {
        self.lock().spares.insert(id.clone());
        self.start(id, spec, link).await
    }

    fn is_spare(&self, id: &SandboxId) -> bool {
        self.lock().spares.contains(id)
    }

    async fn claim(&self, id: &SandboxId, _: &SandboxSpec) -> Result<bool, SandboxError> {
        self.step("claim").await?;
        if !self.lock().shims.contains_key(id) {
            return Ok(false);
        }
        self.lock().spares.remove(id);
        self.step("claimed").await?;
        Ok(true)
    }

    async fn clone_failed(&self, id: &SandboxId, _: &SandboxSpec) -> bool {
        let mut inner = self.lock();
        inner.shims.contains_key(id) && std::mem::take(&mut inner.bad_clone)
    }

    async fn move_in(&self, _: &SandboxId, _: &SandboxSpec) -> Result<(), SandboxError> {
        self.step("move in").await
    }

    async fn limit(&self, _: &SandboxId, _: &SandboxSpec) -> Result<(), SandboxError> {
        self.step("limit").await
    }

    fn client(&self, id: &SandboxId) -> ShimClient {
        ShimClient::new(self.socket(id))
    }

    async fn is_alive(&self, id: &SandboxId) -> Result<bool, SandboxError> {
        if self.lock().doubt {
            return Err(SandboxError::step("look for the shim", "cannot tell"));
        }
        Ok(self.lock().shims.contains_key(id))
    }

    async fn last_words(&self, _: &SandboxId) -> Vec<shim::ContainerState> {
        Vec::new()
    }

    async fn end(&self, id: &SandboxId) -> Result<(), SandboxError> {
        self.step("end").await?;
        self.kill_shim(id);
        self.step("ended").await
    }

    async fn forget(&self, id: &SandboxId) -> Result<(), SandboxError> {
        self.step("forget").await?;
        self.lock().folders.remove(id);
        self.lock().spares.remove(id);
        Ok(())
    }

    async fn leftovers(&self) -> Result<Vec<SandboxId>, SandboxError> {
        Ok(self.lock().folders.iter().cloned().collect())
    }
}

/// What a fake shim knows, and what it is told to do wrong.
pub(crate) struct ShimState {
    pub(crate) containers: Mutex<BTreeMap<String, shim::ContainerState>>,
    pub(crate) orders: Mutex<Vec<shim::CreateContainerRequest>>,
    /// What it was told of containers and sizes that it has, in words.
    pub(crate) told: Mutex<Vec<String>>,
    /// What the next call of each name answers instead.
    pub(crate) refusals: Mutex<BTreeMap<&'static str, Status>>,
    /// Calls of these names never return.
    pub(crate) stuck: Mutex<BTreeSet<&'static str>>,
    ended: Mutex<Option<String>>,
    events: Mutex<broadcast::Sender<shim::Event>>,
}

impl ShimState {
    fn new() -> Self {
        Self {
            containers: Mutex::default(),
            orders: Mutex::default(),
            told: Mutex::default(),
            refusals: Mutex::default(),
            stuck: Mutex::default(),
            ended: Mutex::default(),
            events: Mutex::new(broadcast::channel(64).0),
        }
    }

    /// The container's process ends.
    pub(crate) fn exit(&self, id: &str, code: i32) {
        let Some(state) = self.containers.lock().unwrap().get_mut(id).map(|container| {
            container.set_phase(Phase::Exited);
            container.exit = Some(agent::Exit { code, exited_at: 99, ..Default::default() });
            container.clone()
        }) else {
            return;
        };
        self.tell(Kind::ContainerExited(state));
    }

    /// The boundary ends by itself; the shim goes on answering.
    pub(crate) fn end_boundary(&self, why: &str) {
        *self.ended.lock().unwrap() = Some(why.to_owned());
        self.tell(Kind::BoundaryEnded(why.to_owned()));
    }

    /// Every stream of events ends; the next look sees the state.
    pub(crate) fn break_events(&self) {
        *self.events.lock().unwrap() = broadcast::channel(64).0;
    }

    fn tell(&self, kind: Kind) {
        drop(self.events.lock().unwrap().send(shim::Event { kind: Some(kind) }));
    }

    async fn check(&self, name: &'static str) -> Result<(), Status> {
        if self.stuck.lock().unwrap().contains(name) {
            std::future::pending::<()>().await;
        }
        match self.refusals.lock().unwrap().remove(name) {
            Some(status) => Err(status),
            None => Ok(()),
        }
    }

    fn note(&self, request: &impl Debug) {
        self.told.lock().unwrap().push(format!("{request:?}"));
    }

    fn get(&self, id: &str) -> Result<shim::ContainerState, Status> {
        let containers = self.containers.lock().unwrap();
        containers.get(id).cloned().ok_or_else(|| Status::not_found("no such container"))
    }
}

struct Answers(Arc<ShimState>);

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl shim_server::Shim for Answers {
    type EventsStream = Pin<Box<dyn Stream<Item = Result<shim::Event, Status>> + Send>>;
    type ExecStream = tokio_stream::Empty<Result<agent::ExecOutput, Status>>;
    type AttachStream = tokio_stream::Empty<Result<agent::IoOutput, Status>>;
    type PortForwardStream = tokio_stream::Empty<Result<agent::PortOutput, Status>>;

    async fn update_container(
        &self,
        request: Request<agent::UpdateContainerRequest>,
    ) -> Answer<agent::UpdateContainerResponse> {
        self.0.check("update").await?;
        self.0.note(request.get_ref());
        self.0.get(&request.get_ref().container_id)?;
        Ok(Response::new(agent::UpdateContainerResponse {}))
    }

    async fn stats(&self, request: Request<shim::StatsRequest>) -> Answer<shim::StatsResponse> {
        let wanted = request.into_inner().container_ids;
        let of =
            |id: &String| agent::ContainerStats { container_id: id.clone(), ..Default::default() };
        let containers = self.0.containers.lock().unwrap();
        let wanted = containers.keys().filter(|id| wanted.is_empty() || wanted.contains(id));
        let guest =
            agent::StatsResponse { containers: wanted.map(of).collect(), ..Default::default() };
        Ok(Response::new(shim::StatsResponse { guest: Some(guest), ..Default::default() }))
    }

    async fn exec(&self, _: Request<Streaming<agent::ExecInput>>) -> Answer<Self::ExecStream> {
        Err(Status::unimplemented("exec"))
    }

    async fn attach(&self, _: Request<Streaming<shim::AttachInput>>) -> Answer<Self::AttachStream> {
        Err(Status::unimplemented("attach"))
    }

    async fn port_forward(
        &self,
        _: Request<Streaming<agent::PortInput>>,
    ) -> Answer<Self::PortForwardStream> {
        Err(Status::unimplemented("port_forward"))
    }

    async fn configure_sandbox(
        &self,
        _: Request<shim::ConfigureSandboxRequest>,
    ) -> Answer<shim::ConfigureSandboxResponse> {
        self.0.check("configure").await?;
        if let Some(why) = self.0.ended.lock().unwrap().clone() {
            return Err(Status::unavailable(why));
        }
        Ok(Response::new(shim::ConfigureSandboxResponse {
            kernel_release: "6.12".to_owned(),
            ..Default::default()
        }))
    }

    async fn state(&self, _: Request<shim::StateRequest>) -> Answer<shim::StateResponse> {
        self.0.check("state").await?;
        let ended = self.0.ended.lock().unwrap().clone();
        let boundary = if ended.is_some() { Boundary::Ended } else { Boundary::Running };
        Ok(Response::new(shim::StateResponse {
            boundary: boundary.into(),
            end_reason: ended.unwrap_or_default(),
            containers: self.0.containers.lock().unwrap().values().cloned().collect(),
            ..Default::default()
        }))
    }

    async fn create_container(
        &self,
        request: Request<shim::CreateContainerRequest>,
    ) -> Answer<shim::CreateContainerResponse> {
        self.0.check("create").await?;
        let order = request.into_inner();
        let id = order.container.as_ref().unwrap().container_id.clone();
        self.0.orders.lock().unwrap().push(order);
        let state = shim::ContainerState {
            container_id: id.clone(),
            phase: Phase::Created.into(),
            guest_pid: 7,
            ..Default::default()
        };
        self.0.containers.lock().unwrap().insert(id, state.clone());
        self.0.check("created").await?;
        Ok(Response::new(shim::CreateContainerResponse { state: Some(state) }))
    }

    async fn start_container(
        &self,
        request: Request<shim::StartContainerRequest>,
    ) -> Answer<shim::StartContainerResponse> {
        self.0.check("start").await?;
        self.0.note(request.get_ref());
        let mut state = self.0.get(&request.get_ref().container_id)?;
        state.set_phase(Phase::Running);
        state.started_at = 50;
        self.0.containers.lock().unwrap().insert(state.container_id.clone(), state.clone());
        Ok(Response::new(shim::StartContainerResponse { state: Some(state) }))
    }

    async fn signal_container(
        &self,
        request: Request<shim::SignalContainerRequest>,
    ) -> Answer<shim::SignalContainerResponse> {
        self.0.check("signal").await?;
        let request = request.into_inner();
        self.0.note(&request);
        // A process that ends on SIGKILL and on SIGINT and ignores the rest.
        if matches!(request.signal, 2 | 9) {
            self.0.exit(&request.container_id, 128 + request.signal as i32);
        }
        Ok(Response::new(shim::SignalContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<shim::RemoveContainerRequest>,
    ) -> Answer<shim::RemoveContainerResponse> {
        self.0.check("remove").await?;
        self.0.note(request.get_ref());
        self.0.containers.lock().unwrap().remove(&request.get_ref().container_id);
        Ok(Response::new(shim::RemoveContainerResponse {}))
    }

    async fn reopen_log(
        &self,
        request: Request<shim::ReopenLogRequest>,
    ) -> Answer<shim::ReopenLogResponse> {
        self.0.note(request.get_ref());
        self.0.get(&request.get_ref().container_id)?;
        Ok(Response::new(shim::ReopenLogResponse {}))
    }

    async fn exec_sync(
        &self,
        request: Request<shim::ExecSyncRequest>,
    ) -> Answer<shim::ExecSyncResponse> {
        self.0.check("exec").await?;
        let request = request.into_inner();
        let stdout = format!("{} {}", request.args.join(" "), request.timeout_ms).into();
        Ok(Response::new(shim::ExecSyncResponse { stdout, ..Default::default() }))
    }

    async fn events(&self, _: Request<shim::EventsRequest>) -> Answer<Self::EventsStream> {
        let live = BroadcastStream::new(self.0.events.lock().unwrap().subscribe());
        // Begins with what has happened.
        let exited: Vec<_> = self
            .0
            .containers
            .lock()
            .unwrap()
            .values()
            .filter(|container| container.phase() == Phase::Exited)
            .map(|container| Kind::ContainerExited(container.clone()))
            .collect();
        let past = tokio_stream::iter(exited).map(|kind| Ok(shim::Event { kind: Some(kind) }));
        let live = live.map(|event| event.map_err(|_| Status::data_loss("too slow")));
        Ok(Response::new(Box::pin(past.chain(live))))
    }

    async fn resize(&self, request: Request<shim::ResizeRequest>) -> Answer<shim::ResizeResponse> {
        self.0.check("resize").await?;
        self.0.note(request.get_ref());
        Ok(Response::new(shim::ResizeResponse { memory_mb: request.get_ref().memory_mb }))
    }

    async fn shutdown(&self, _: Request<shim::ShutdownRequest>) -> Answer<shim::ShutdownResponse> {
        self.0.end_boundary("shut down");
        Ok(Response::new(shim::ShutdownResponse {}))
    }
}
