//! Makes one process with the launcher and talks to it until its exec.

use crate::{
    child::GO,
    error::{Error, Step},
    launcher::{self, Descriptors, Launched, Launcher, receive_async},
    plan::{Failure, FailureKind, Plan, Report, User},
    reaper::{Ended, Expected, Reaper},
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

/// A process that gets itself ready.
#[derive(Debug)]
pub struct Starting<'a> {
    /// In the agent's PID namespace.
    pub pid: Pid,
    /// Its own, for ever.
    pub pidfd: OwnedFd,
    ended: oneshot::Receiver<Ended>,
    control: AsyncFd<OwnedFd>,
    reaper: &'a Reaper,
    expected: Expected<'a>,
    /// The process that gets ready will be another one.
    awaits_child: bool,
}

/// Makes a process. `descriptors` needs neither plan nor control.
pub async fn start<'a>(
    launcher: &Launcher,
    reaper: &'a Reaper,
    plan: &Plan,
    namespaces: u64,
    mut descriptors: Descriptors,
) -> Result<Starting<'a>, Error> {
    let (ours, theirs) = launcher::packet_pair().step("control socket")?;
    rustix::fs::fcntl_setfl(&ours, rustix::fs::OFlags::NONBLOCK).step("control socket")?;
    let control = a3s_box_sys::watch::watch(ours, Interest::READABLE).step("control socket")?;
    descriptors.control = Some(theirs);
    descriptors.plan = Some(memfd(plan).step("plan")?);

    let expected = reaper.expect();
    let Launched { pid, pidfd } =
        launcher.launch(namespaces, descriptors).await.step("make the process")?;
    let ended = reaper.end_of(&expected, pid);
    let awaits_child = plan.goes_on_in_a_child();
    Ok(Starting { pid, pidfd, ended, control, reaper, expected, awaits_child })
}

impl Starting<'_> {
    /// Says the word that the plan waits for.
    pub fn go_on(&self) -> Result<(), Error> {
        match launcher::send(self.control.get_ref().as_fd(), &[GO], &[]) {
            // Why it has ended is its report's to say.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            result => result.step("let the process go on"),
        }
    }

    /// Waits until it is ready.
    pub async fn ready(mut self) -> Result<Spawned, Error> {
        let mut ready = None;
        loop {
            match report(&self.control).await? {
                Some((Report::Ready(user), terminal)) => ready = Some((user, terminal)),
                Some((Report::Child(pid), pidfd)) => {
                    let child = Pid::from_raw(pid).zip(pidfd);
                    (self.pid, self.pidfd) = child.ok_or_else(|| unexpected("no child"))?;
                    self.ended = self.reaper.end_of(&self.expected, self.pid);
                    self.awaits_child = false;
                }
                Some((Report::Failed(failure), _)) => return Err(failure.into()),
                None => {
                    let ended = self.ended.await;
                    let how =
                        ended.map_or_else(|_| "unknown".to_owned(), |ended| ended.code.to_string());
                    let message = format!("the process ended before it was ready, with code {how}");
                    return Err(Failure { kind: FailureKind::Internal, message }.into());
                }
            }
            // The two of them tell in any order.
            if let Some((user, terminal)) = ready.take_if(|_| !self.awaits_child) {
                let Self { pid, pidfd, ended, control, .. } = self;
                return Ok(Spawned { pid, pidfd, user, terminal, ended, gate: Gate(control) });
            }
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
            Some((Report::Ready(_) | Report::Child(_), _)) => Err(unexpected("ready twice")),
        }
    }
}

fn unexpected(report: &str) -> Error {
    Error::NotNow(format!("the process told something unexpected: {report}"))
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
