//! One container: its record, and the task that carries its output to the log.

use crate::{
    log_file::{Log, Stream},
    records,
};
use a3s_box_api::agent::v1::{self as agent, agent_client::AgentClient, io_output};
use a3s_box_types::shim::{ContainerExit, ContainerPhase, ContainerRecord};
use std::{
    io,
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tonic::{Status, transport::Channel};

/// How long output may still come after a container's end is known.
const DRAIN: Duration = Duration::from_secs(2);

/// A container of this sandbox.
#[derive(Debug)]
pub struct Container {
    folder: PathBuf,
    record: Mutex<ContainerRecord>,
    log: Mutex<Option<Log>>,
    /// True once all output is in the log.
    drained: watch::Receiver<bool>,
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
        close_stdin: bool,
    ) -> Result<Self, Status> {
        records::save_container(&folder, &record)
            .map_err(|err| Status::internal(format!("save the container's record: {err}")))?;
        let (log, writer) = log;
        let (stdin, inputs) = mpsc::channel(4);
        let first = agent::IoInput {
            container_id: record.container_id.to_string(),
            close_stdin,
            ..agent::IoInput::default()
        };
        // The channel has room: this is its first message.
        stdin.try_send(first).map_err(|err| Status::internal(err.to_string()))?;
        let outputs = agent.container_io(ReceiverStream::new(inputs)).await?.into_inner();
        let (done, drained) = watch::channel(false);
        let out = log.clone();
        tokio::spawn(async move {
            copy(outputs, &out).await;
            // Kept until here: closing it earlier would end the call.
            drop(stdin);
            drop(out);
            done.send_replace(true);
        });
        // Ends after the last handle on the log; nobody waits for it but the runtime.
        drop(writer);
        Ok(Self { folder, record: Mutex::new(record), log: Mutex::new(Some(log)), drained })
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

async fn copy(mut outputs: tonic::Streaming<agent::IoOutput>, log: &Log) {
    while let Some(Ok(output)) = outputs.next().await {
        match output.kind {
            Some(io_output::Kind::Stdout(bytes)) => log.write(Stream::Stdout, bytes).await,
            Some(io_output::Kind::Stderr(bytes)) => log.write(Stream::Stderr, bytes).await,
            None => {}
        }
    }
}
