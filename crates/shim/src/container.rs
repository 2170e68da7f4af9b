//! One container: its record, and the task that carries its output to the log and to attached clients.
//!
//! An attached client that does not read holds up the container's output, as it does with other runtimes;
//! the log has everything first, and other containers are not touched by it.

use crate::{
    log_file::{Log, Stream},
    records,
};
use a3s_box_api::{
    agent::v1::{self as agent, agent_client::AgentClient, io_output},
    shim::v1 as shim,
};
use a3s_box_types::shim::{ContainerExit, ContainerPhase, ContainerRecord};
use bytes::Bytes;
use std::{
    io,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::{Status, Streaming, transport::Channel};

/// How long output may still come after a container's end is known.
const DRAIN: Duration = Duration::from_secs(2);
/// Pieces of output on their way to one client.
const WAITING: usize = 4;

/// A container of this sandbox.
#[derive(Debug)]
pub struct Container {
    folder: PathBuf,
    record: Mutex<ContainerRecord>,
    log: Mutex<Option<Log>>,
    /// True once all output is in the log.
    drained: watch::Receiver<bool>,
    io: Arc<Io>,
}

/// The container's own streams.
#[derive(Debug)]
struct Io {
    /// To the agent; without it the call would end.
    inputs: mpsc::Sender<agent::IoInput>,
    /// Clients that see the output from now on; `None` after its end.
    attached: Mutex<Option<Vec<mpsc::Sender<Answer>>>>,
    stdin: Stdin,
}

/// What an attached client is sent.
pub type Answer = Result<agent::IoOutput, Status>;

/// What becomes of a container's stdin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stdin {
    /// It has none.
    None,
    /// Open for as long as the container runs.
    Open,
    /// Closed when the first attached client closes its own.
    Once,
}

impl Container {
    /// Saves the record and takes over the container's output.
    ///
    /// # Errors
    /// The record's file, or the agent's.
    pub async fn adopt(
        folder: PathBuf,
        record: ContainerRecord,
        mut agent: AgentClient<Channel>,
        log: (Log, JoinHandle<()>),
        stdin: Stdin,
    ) -> Result<Self, Status> {
        records::save_container(&folder, &record)
            .map_err(|err| Status::internal(format!("save the container's record: {err}")))?;
        let (log, writer) = log;
        let (sender, inputs) = mpsc::channel(4);
        let first = agent::IoInput {
            container_id: record.container_id.to_string(),
            close_stdin: stdin == Stdin::None,
            ..agent::IoInput::default()
        };
        // The channel has room: this is its first message.
        sender.try_send(first).map_err(|err| Status::internal(err.to_string()))?;
        let outputs = agent.container_io(ReceiverStream::new(inputs)).await?.into_inner();
        let (done, drained) = watch::channel(false);
        let io = Arc::new(Io { inputs: sender, attached: Mutex::new(Some(Vec::new())), stdin });
        let (out, copied) = (log.clone(), io.clone());
        tokio::spawn(async move {
            copy(outputs, &out, &copied).await;
            copied.attached().take();
            drop(out);
            done.send_replace(true);
        });
        // Ends after the last handle on the log; nobody waits for it but the runtime.
        drop(writer);
        Ok(Self { folder, record: Mutex::new(record), log: Mutex::new(Some(log)), drained, io })
    }

    /// Notes what ended the boundary, for the record of its end.
    pub fn ends_with_boundary(&self, why: &str) {
        why.clone_into(&mut self.record.lock().unwrap_or_else(PoisonError::into_inner).end_reason);
    }

    /// What is known of it.
    pub fn record(&self) -> ContainerRecord {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Notes that its command runs; one that has ended already stays ended.
    ///
    /// # Errors
    /// The record's file.
    pub fn started(&self, at: i64) -> io::Result<ContainerRecord> {
        self.change(|record| {
            record.started_at = at;
            if record.phase == ContainerPhase::Created {
                record.phase = ContainerPhase::Running;
            }
        })
    }

    /// Notes its end, after its output; the first end counts.
    ///
    /// # Errors
    /// The record's file.
    pub async fn exited(&self, exit: ContainerExit) -> io::Result<ContainerRecord> {
        let mut drained = self.drained.clone();
        // A process that was handed the output elsewhere must not hide the end.
        tokio::time::timeout(DRAIN, drained.wait_for(|done| *done)).await.ok();
        self.log.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.change(|record| {
            if record.phase != ContainerPhase::Exited {
                record.phase = ContainerPhase::Exited;
                record.exit = Some(exit);
            }
        })
    }

    /// Opens the log's path anew.
    ///
    /// # Errors
    /// The file's.
    pub async fn reopen_log(&self) -> io::Result<()> {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match log {
            Some(log) => log.reopen().await,
            None => Err(io::Error::new(io::ErrorKind::NotConnected, "the container has ended")),
        }
    }

    /// Shows a client the output from now on, and takes its input, until either has ended.
    ///
    /// # Errors
    /// The output has ended already.
    pub fn attach(
        &self,
        first: shim::AttachInput,
        inputs: Streaming<shim::AttachInput>,
    ) -> Result<mpsc::Receiver<Answer>, Status> {
        let (client, answers) = mpsc::channel(WAITING);
        match &mut *self.io.attached() {
            Some(attached) => attached.push(client.clone()),
            None => return Err(Status::failed_precondition("the container has ended")),
        }
        let (io, mut drained) = (self.io.clone(), self.drained.clone());
        let (has_stdin, ends_with_stdin) = (first.has_stdin, first.ends_with_stdin);
        tokio::spawn(async move {
            tokio::select! {
                () = io.feed(first, inputs) => {}
                () = client.closed() => {}
                // This handle on the client must not keep its call open after the container's end.
                _ = drained.wait_for(|drained| *drained) => return,
            }
            if has_stdin {
                io.end_stdin().await;
            }
            if ends_with_stdin {
                io.forget(&client);
            }
        });
        Ok(answers)
    }

    fn change(&self, change: impl FnOnce(&mut ContainerRecord)) -> io::Result<ContainerRecord> {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        let mut next = record.clone();
        change(&mut next);
        // Disk first: nobody may read what a crash would take back.
        records::save_container(&self.folder, &next)?;
        *record = next.clone();
        Ok(next)
    }
}

impl Io {
    fn attached(&self) -> MutexGuard<'_, Option<Vec<mpsc::Sender<Answer>>>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One client's stdin has ended.
    async fn end_stdin(&self) {
        if self.stdin == Stdin::Once {
            let end = agent::IoInput { close_stdin: true, ..agent::IoInput::default() };
            // An error: the container is gone.
            self.inputs.send(end).await.ok();
        }
    }

    /// Shows a client nothing more.
    fn forget(&self, client: &mpsc::Sender<Answer>) {
        if let Some(attached) = &mut *self.attached() {
            attached.retain(|one| !one.same_channel(client));
        }
    }

    /// Passes one client's input on, to its end.
    async fn feed(&self, first: shim::AttachInput, mut inputs: Streaming<shim::AttachInput>) {
        let ends_with_stdin = first.ends_with_stdin;
        let mut next = Some(first);
        while let Some(input) = next {
            let last = ends_with_stdin && input.close_stdin;
            let input = agent::IoInput {
                stdin: if self.stdin == Stdin::None { Bytes::new() } else { input.stdin },
                close_stdin: input.close_stdin && self.stdin == Stdin::Once,
                resize: input.resize,
                ..agent::IoInput::default()
            };
            let empty = input.stdin.is_empty() && !input.close_stdin && input.resize.is_none();
            if !empty && self.inputs.send(input).await.is_err() || last {
                return;
            }
            next = inputs.message().await.ok().flatten();
        }
    }

    /// Shows a piece of output to all attached clients.
    async fn show(&self, output: &agent::IoOutput) {
        let clients = self.attached().clone().unwrap_or_default();
        if clients.is_empty() {
            return;
        }
        for client in &clients {
            // It may be gone.
            client.send(Ok(output.clone())).await.ok();
        }
        if let Some(attached) = &mut *self.attached() {
            attached.retain(|client| !client.is_closed());
        }
    }
}

async fn copy(mut outputs: Streaming<agent::IoOutput>, log: &Log, io: &Io) {
    while let Some(Ok(output)) = outputs.next().await {
        match &output.kind {
            Some(io_output::Kind::Stdout(bytes)) => log.write(Stream::Stdout, bytes.clone()).await,
            Some(io_output::Kind::Stderr(bytes)) => log.write(Stream::Stderr, bytes.clone()).await,
            None => {}
        }
        io.show(&output).await;
    }
}
