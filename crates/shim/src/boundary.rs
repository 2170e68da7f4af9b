//! The boundary's life: one task owns what it consists of, [`crate::microvm`] or [`crate::host`].
//!
//! ```text
//! Starting --the agent answers--> Running --a part of it ends, Shutdown--> Ended
//!     \_____________________________________________________________________^
//! ```

use crate::{host, host_stats, microvm, records};
use a3s_box_api::agent::v1::agent_client::AgentClient;
use a3s_box_lane::lease::Lender;
use a3s_box_sys::{
    cgroup::{self, Cgroup, Usage},
    duplex::Duplex,
};
use a3s_box_types::shim::{Process, Processes};
use a3s_box_vmm::{Console, Hardware};
use anyhow::Context;
use hyper_util::rt::TokioIo;
use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};
use tokio::sync::{mpsc, watch};
use tonic::transport::{Channel, Endpoint};

/// Largest message to or from the agent.
pub const MESSAGE_MAX: usize = 16 << 20;
/// What the agent may send ahead on one call, and on all: a client that does not read must not hold up
/// the others.
pub const CALL_WINDOW: u32 = 256 << 10;
pub const CONNECTION_WINDOW: u32 = 64 << 20;

/// Stands before the reason of a boundary that the node's kernel has killed.
const KILLED_FOR_MEMORY: &str =
    "the node's kernel killed it for want of memory, the node's or its cgroup's: ";

/// Where the boundary stands.
#[derive(Debug, Clone)]
pub enum Boundary {
    /// The agent does not answer yet.
    Starting,
    /// The agent answers.
    Running(AgentClient<Channel>),
    /// It is gone; why.
    Ended(String),
}

/// What a boundary is started with.
#[derive(Debug)]
pub enum Parts {
    /// A virtual machine.
    Microvm(microvm::Parts),
    /// The node's kernel.
    Host(host::Parts),
}

/// A handle on the boundary; its task ends with it.
#[derive(Debug)]
pub struct Handle {
    /// Follows the state.
    pub state: watch::Receiver<Boundary>,
    /// Where that is all there is of it.
    cgroup: Option<Cgroup>,
    kill: mpsc::Sender<()>,
    facts: Arc<Mutex<Facts>>,
}

/// What is known of the boundary for whoever asks.
#[derive(Debug, Clone, Default)]
struct Facts {
    /// The first is the one that stands for the boundary.
    processes: Vec<u32>,
    console: Console,
    /// Of a virtual machine that runs.
    hardware: Option<Hardware>,
    /// As that.
    lanes: Option<Arc<Lender>>,
    stages: HashMap<String, f64>,
    clone_failed: bool,
}

impl Handle {
    /// Starts the boundary in a task of the main thread. `folder` is the shim's, and `processes` are
    /// recorded there already.
    pub fn start(parts: Parts, folder: PathBuf, processes: Processes, since: Instant) -> Self {
        let (publish, state) = watch::channel(Boundary::Starting);
        let (kill, killed) = mpsc::channel(1);
        let facts = Arc::new(Mutex::new(Facts::default()));
        let owner = Owner { folder, processes, facts: facts.clone(), publish, killed, since };
        let cgroup = match &parts {
            Parts::Microvm(_) => None,
            Parts::Host(parts) => Some(parts.cgroup.clone()),
        };
        tokio::spawn(owner.run(parts));
        Self { state, cgroup, kill, facts }
    }

    /// Ends the boundary and waits until it is gone.
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

    /// The process that stands for the boundary: QEMU's, or the agent's on the node's kernel; 0 before it
    /// runs.
    pub fn pid(&self) -> u32 {
        self.facts().processes.first().copied().unwrap_or_default()
    }

    /// What the pod takes of the node: its processes there and, on the node's own kernel, those that
    /// have ended.
    pub fn usage(&self) -> io::Result<Usage> {
        match &self.cgroup {
            Some(cgroup) => cgroup.usage(),
            None => {
                let shim = std::iter::once(std::process::id());
                Ok(host_stats::of(shim.chain(self.facts().processes)))
            }
        }
    }

    /// What the guest printed last.
    pub fn console_tail(&self) -> String {
        self.facts().console.tail()
    }

    /// The virtual machine's hardware, once it runs; `None` on the node's kernel.
    pub fn hardware(&self) -> Option<Hardware> {
        self.facts().hardware
    }

    /// The virtual machine's lanes, once it runs; `None` on the node's kernel.
    pub fn lanes(&self) -> Option<Arc<Lender>> {
        self.facts().lanes
    }

    /// Milliseconds since the shim's start, by stage.
    pub fn stages(&self) -> HashMap<String, f64> {
        self.facts().stages
    }

    /// Its template was of no use.
    pub fn clone_failed(&self) -> bool {
        self.facts().clone_failed
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

/// The owner's task.
pub struct Owner {
    /// The shim's.
    pub folder: PathBuf,
    processes: Processes,
    facts: Arc<Mutex<Facts>>,
    publish: watch::Sender<Boundary>,
    killed: mpsc::Receiver<()>,
    since: Instant,
}

impl Owner {
    async fn run(mut self, parts: Parts) {
        let lived = match parts {
            Parts::Microvm(parts) => microvm::live(&mut self, parts).await,
            Parts::Host(parts) => host::live(&mut self, parts).await,
        };
        let mut why = lived.unwrap_or_else(|err| format!("{err:#}"));
        if cgroup::own_oom_kills() > 0 {
            why.insert_str(0, KILLED_FOR_MEMORY);
        }
        tracing::info!(why, "the boundary has ended");
        self.publish.send_replace(Boundary::Ended(why));
    }

    /// Records a process of the boundary before the next one is started.
    pub fn started(
        &mut self,
        pid: u32,
        slot: impl FnOnce(&mut Processes) -> &mut Option<Process>,
    ) -> io::Result<()> {
        *slot(&mut self.processes) = Some(records::process(pid)?);
        records::save_processes(&self.folder, &self.processes)?;
        self.facts.lock().unwrap_or_else(PoisonError::into_inner).processes.push(pid);
        Ok(())
    }

    /// Notes that `stage` is over.
    pub fn reached(&self, stage: &str) {
        note(&self.facts, stage, self.since);
    }

    /// Shows the console to whoever asks.
    pub fn show_console(&self, console: Console) {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner).console = console;
    }

    /// Notes that the template is of no use.
    pub fn clone_failed(&self) {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner).clone_failed = true;
    }

    /// Lets the machine be changed.
    pub fn show_hardware(&self, hardware: Hardware) {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner).hardware = Some(hardware);
    }

    /// Lets its lanes be lent.
    pub fn show_lanes(&self, lanes: Lender) {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner).lanes = Some(Arc::new(lanes));
    }

    /// Publishes the agent behind `stream` once it answers. Comes back with the reason when `ended`
    /// does, when somebody ends the boundary, or when the agent cannot be talked to.
    pub async fn serve(
        &mut self,
        stream: impl Future<Output = anyhow::Result<Duplex>>,
        ended: impl Future<Output = String>,
    ) -> String {
        let connected = async {
            match async { connect(stream.await?).await }.await {
                Ok(client) => {
                    note(&self.facts, "agent_ready", self.since);
                    self.publish.send_replace(Boundary::Running(client));
                    std::future::pending().await
                }
                Err(err) => format!("{err:#}"),
            }
        };
        tokio::select! {
            why = ended => why,
            _ = self.killed.recv() => "it was shut down".to_owned(),
            why = connected => why,
        }
    }
}

async fn connect(stream: Duplex) -> anyhow::Result<AgentClient<Channel>> {
    let stream = Arc::new(Mutex::new(Some(stream)));
    // The one connection for the boundary's life: there is nothing to connect to again.
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
