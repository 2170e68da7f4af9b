//! Makes one process with the launcher and talks to it until its exec.

use crate::{
    child::GO,
    error::{Error, Step},
    launcher::{self, Descriptors, Launched, Launcher, receive_async},
    plan::{Failure, FailureKind, Plan, Report, User},
    reaper::{Ended, Reaper},
};
use rustix::{
    fd::{AsFd, OwnedFd},
    process::Pid,
};
use std::{fs::File, io, os::unix::fs::FileExt};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::oneshot,
};

/// A process that waits for the word to exec.
#[derive(Debug)]
pub struct Spawned {
    /// In the agent's PID namespace.
    pub pid: Pid,
    /// Its own, for ever.
    pub pidfd: OwnedFd,
    /// Who it runs as.
    pub user: User,
    /// Master of its terminal.
    pub terminal: Option<OwnedFd>,
    /// Comes true at its end.
    pub ended: oneshot::Receiver<Ended>,
    /// The way to let it go.
    pub gate: Gate,
}

/// A stopped process's control socket. Dropping it ends the process.
#[derive(Debug)]
pub struct Gate(AsyncFd<OwnedFd>);

/// Makes a process and waits until it is ready. `descriptors` needs neither plan nor control.
pub async fn spawn(
    launcher: &Launcher,
    reaper: &Reaper,
    plan: &Plan,
    namespaces: u64,
    mut descriptors: Descriptors,
) -> Result<Spawned, Error> {
    let (ours, theirs) = launcher::packet_pair().step("control socket")?;
    rustix::fs::fcntl_setfl(&ours, rustix::fs::OFlags::NONBLOCK).step("control socket")?;
    let control = a3s_box_sys::watch::watch(ours, Interest::READABLE).step("control socket")?;
    descriptors.control = Some(theirs);
    descriptors.plan = Some(memfd(plan).step("plan")?);

    let expected = reaper.expect();
    let Launched { pid, pidfd } =
        launcher.launch(namespaces, descriptors).await.step("make the process")?;
    let mut ended = reaper.end_of(&expected, pid);
    drop(expected);
    match report(&control).await? {
        Some((Report::Ready(user), terminal)) => {
            Ok(Spawned { pid, pidfd, user, terminal, ended, gate: Gate(control) })
        }
        Some((Report::Failed(failure), _)) => Err(failure.into()),
        None => {
            let how = (&mut ended)
                .await
                .map_or_else(|_| "unknown".to_owned(), |ended| ended.code.to_string());
            let message = format!("the process ended before it was ready, with code {how}");
            Err(Failure { kind: FailureKind::Internal, message }.into())
        }
    }
}

impl Gate {
    /// Lets it exec, and says whether that worked. A process killed in between has worked, too: its
    /// end is told by its exit.
    pub async fn open(self) -> Result<(), Error> {
        match launcher::send(self.0.get_ref().as_fd(), &[GO], &[]) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            result => result.step("start the process")?,
        }
        match report(&self.0).await? {
            None => Ok(()),
            Some((Report::Failed(failure), _)) => Err(failure.into()),
            Some((Report::Ready(_), _)) => {
                Err(Error::NotNow("the process was ready twice".to_owned()))
            }
        }
    }
}

async fn report(control: &AsyncFd<OwnedFd>) -> Result<Option<(Report, Option<OwnedFd>)>, Error> {
    let mut bytes = vec![0; 64 << 10];
    let (length, mut fds) = match receive_async(control, &mut bytes).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
        received => received.step("hear from the process")?,
    };
    if length == 0 {
        return Ok(None);
    }
    let report = serde_json::from_slice(&bytes[..length]).step("hear from the process")?;
    Ok(Some((report, fds.pop())))
}

fn memfd(plan: &Plan) -> io::Result<OwnedFd> {
    let file: File = a3s_box_sys::memfd::create("plan")?;
    file.write_all_at(&serde_json::to_vec(plan)?, 0)?;
    Ok(file.into())
}
