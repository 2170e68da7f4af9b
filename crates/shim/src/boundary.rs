//! The boundary's life: one task owns the virtual machine and the volume server.
//!
//! ```text
//! Starting --agent's hello--> Running --QEMU or the volume server ends, Shutdown--> Ended
//!     \______________________________________________________________________________^
//! ```

use crate::{records, volume_server::VolumeServer};
use a3s_box_api::agent::v1::agent_client::AgentClient;
use a3s_box_types::shim::{Processes, ShimConfig, Start};
use a3s_box_vmm::{Console, Vm, VmParts, VmStreams, disk, template, wait_hello};
use anyhow::Context;
use hyper_util::rt::TokioIo;
use std::{
    collections::HashMap,
    fs::File,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, watch};
use tonic::transport::{Channel, Endpoint};

/// A cold boot under full load; a clone needs a hundredth of it.
const HELLO_DEADLINE: Duration = Duration::from_secs(60);
/// Largest message to or from the agent.
pub const MESSAGE_MAX: usize = 16 << 20;
/// What the agent may send ahead on one call, and on all: a client that does not read must not hold up
/// the others.
const CALL_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 64 << 20;

/// Where the boundary stands.
#[derive(Debug, Clone)]
pub enum Boundary {
    /// The guest has not said hello.
    Starting,
    /// The agent answers.
    Running(AgentClient<Channel>),
    /// It is gone; why.
    Ended(String),
}

/// What a boundary is started with.
#[derive(Debug)]
pub struct Parts {
    /// The shim's state folder.
    pub folder: PathBuf,
    /// The share's folder, mounted.
    pub share_root: PathBuf,
    /// The order.
    pub config: ShimConfig,
    /// The guest's card.
    pub tap: OwnedFd,
    /// The template's memory, for a clone.
    pub template_ram: Option<OwnedFd>,
    /// The shim itself, recorded already.
    pub processes: Processes,
}

/// A handle on the boundary; its task ends with the machine.
#[derive(Debug)]
pub struct Handle {
    /// Follows the state.
    pub state: watch::Receiver<Boundary>,
    kill: mpsc::Sender<()>,
    facts: Arc<Mutex<Facts>>,
}

/// What is known of the machine for whoever asks.
#[derive(Debug, Clone, Default)]
struct Facts {
    vmm_pid: u32,
    volume_server_pid: u32,
    console: Console,
    stages: HashMap<String, f64>,
}

impl Handle {
    /// Starts the boundary in a task of the main thread.
    pub fn start(parts: Parts, since: Instant) -> Self {
        let (publish, state) = watch::channel(Boundary::Starting);
        let (kill, killed) = mpsc::channel(1);
        let facts = Arc::new(Mutex::new(Facts::default()));
        let owner = Owner { facts: facts.clone(), publish, killed, since };
        tokio::spawn(owner.run(parts));
        Self { state, kill, facts }
    }

    /// Ends the machine and waits until it is gone.
    pub async fn end(&self) {
        // A full channel: somebody has asked already. A closed one: it has ended.
        self.kill.try_send(()).ok();
        let mut state = self.state.clone();
        state.wait_for(|state| matches!(state, Boundary::Ended(_))).await.ok();
    }

    /// The agent, once there is one.
    pub async fn agent(&self) -> Result<AgentClient<Channel>, tonic::Status> {
        let mut state = self.state.clone();
        let gone = || tonic::Status::unavailable("the boundary's owner has ended");
        let state = state.wait_for(|state| !matches!(state, Boundary::Starting)).await;
        match &*state.map_err(|_| gone())? {
            Boundary::Running(agent) => Ok(agent.clone()),
            Boundary::Ended(why) => Err(tonic::Status::unavailable(why.clone())),
            Boundary::Starting => Err(gone()),
        }
    }

    /// QEMU's process id; 0 before it runs.
    pub fn vmm_pid(&self) -> u32 {
        self.facts().vmm_pid
    }

    /// The boundary's processes so far, and the shim.
    pub fn processes(&self) -> Vec<u32> {
        let facts = self.facts();
        let others = [facts.vmm_pid, facts.volume_server_pid];
        std::iter::once(std::process::id())
            .chain(others.into_iter().filter(|pid| *pid != 0))
            .collect()
    }

    /// What the guest printed last.
    pub fn console_tail(&self) -> String {
        self.facts().console.tail()
    }

    /// Milliseconds since the shim's start, by stage.
    pub fn stages(&self) -> HashMap<String, f64> {
        self.facts().stages
    }

    /// Notes that `stage` is over.
    pub fn reached(&self, stage: &str, since: Instant) {
        note(&self.facts, stage, since);
    }

    fn facts(&self) -> Facts {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn note(facts: &Mutex<Facts>, stage: &str, since: Instant) {
    let ms = since.elapsed().as_secs_f64() * 1000.0;
    facts.lock().unwrap_or_else(PoisonError::into_inner).stages.insert(stage.to_owned(), ms);
}

struct Owner {
    facts: Arc<Mutex<Facts>>,
    publish: watch::Sender<Boundary>,
    killed: mpsc::Receiver<()>,
    since: Instant,
}

impl Owner {
    async fn run(mut self, parts: Parts) {
        let why = match self.live(parts).await {
            Ok(why) => why,
            Err(err) => format!("{err:#}"),
        };
        tracing::info!(why, "the boundary has ended");
        self.publish.send_replace(Boundary::Ended(why));
    }

    /// From start to end; why it ended.
    async fn live(&mut self, mut parts: Parts) -> anyhow::Result<String> {
        let disk = scratch_disk(&parts.config).context("make the scratch disk")?;
        let vm_parts = VmParts {
            config: parts.config.vm.clone(),
            disk,
            tap: parts.tap,
            template_ram: parts.template_ram.take(),
            console_file: parts.folder.join(a3s_box_types::shim::CONSOLE_FILE),
        };
        let (mut vm, VmStreams { agent, volumes }) = Vm::start(vm_parts).await?;
        note(&self.facts, "vmm_spawned", self.since);
        {
            let mut facts = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
            facts.vmm_pid = vm.pid();
            facts.console = vm.console();
        }
        parts.processes.vmm = Some(records::process(vm.pid())?);
        records::save_processes(&parts.folder, &parts.processes)?;
        let init = match &parts.config.vm.start {
            Start::Clone { template } => Some(template.join(template::FUSE_INIT_FILE)),
            Start::Boot { .. } => None,
        };
        let mut volumes = VolumeServer::start(&parts.share_root, volumes, init.as_deref())
            .context("start the volume server")?;
        parts.processes.volume_server = Some(records::process(volumes.pid())?);
        self.facts.lock().unwrap_or_else(PoisonError::into_inner).volume_server_pid = volumes.pid();
        records::save_processes(&parts.folder, &parts.processes)?;
        let why = tokio::select! {
            exit = vm.wait() => exit.reason,
            why = volumes.wait() => why,
            _ = self.killed.recv() => "it was shut down".to_owned(),
            err = connect_and_serve(&self.publish, &self.facts, self.since, agent) => format!("{err:#}"),
        };
        vm.kill().await;
        Ok(with_console(why, &vm.console_tail()))
    }
}

/// Waits for the hello, publishes the agent, and then never returns.
async fn connect_and_serve(
    publish: &watch::Sender<Boundary>,
    facts: &Mutex<Facts>,
    since: Instant,
    agent: std::os::unix::net::UnixStream,
) -> anyhow::Error {
    match connect(agent).await {
        Ok(client) => {
            note(facts, "agent_ready", since);
            publish.send_replace(Boundary::Running(client));
            std::future::pending().await
        }
        Err(err) => err,
    }
}

async fn connect(agent: std::os::unix::net::UnixStream) -> anyhow::Result<AgentClient<Channel>> {
    let mut stream = tokio::net::UnixStream::from_std(agent)?;
    wait_hello(&mut stream, HELLO_DEADLINE).await?;
    let stream = Arc::new(Mutex::new(Some(stream)));
    // The one connection for the machine's life: there is nothing to connect to again.
    let connector = tower::service_fn(move |_| {
        let taken = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        async move {
            taken.map(TokioIo::new).ok_or_else(|| io::Error::from(io::ErrorKind::NotConnected))
        }
    });
    let channel = Endpoint::from_static("http://agent")
        .initial_stream_window_size(CALL_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .connect_with_connector(connector)
        .await
        .context("talk to the agent")?;
    Ok(AgentClient::new(channel)
        .max_decoding_message_size(MESSAGE_MAX)
        .max_encoding_message_size(MESSAGE_MAX))
}

fn scratch_disk(config: &ShimConfig) -> io::Result<File> {
    if let Some(folder) = config.disk.parent() {
        std::fs::create_dir_all(folder)?;
    }
    match &config.vm.start {
        Start::Clone { template } => {
            let from = File::open(template.join(template::DISK_FILE))?;
            disk::copy_sparse(&from, Path::new(&config.disk))
        }
        Start::Boot { .. } => disk::format(&config.disk, config.disk_bytes),
    }
}

fn with_console(why: String, console: &str) -> String {
    let lines: Vec<&str> =
        console.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    if lines.is_empty() {
        return why;
    }
    let tail = lines[lines.len().saturating_sub(4)..].join(" | ");
    format!("{why} (the guest's console ends with: {tail})")
}
