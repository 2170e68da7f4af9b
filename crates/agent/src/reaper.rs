//! The one place that waits for children: of the agent's own making, and in a guest every orphan.

use rustix::process::{Pid, WaitOptions, wait};
use std::{
    collections::HashMap,
    io,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Exit code, or 128 and the signal.
    pub code: i32,
    /// The signal that ended it, or 0.
    pub signal: u32,
    /// Unix nanoseconds.
    pub at: i64,
}

/// Exits and those who wait for them.
#[derive(Debug, Default)]
pub struct Reaper(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    /// Launches whose pid is not known yet.
    expected: usize,
    /// Exits nobody waited for, kept while a launch may still ask for them.
    early: HashMap<Pid, Ended>,
    waiting: HashMap<Pid, oneshot::Sender<Ended>>,
}

/// From before a launch until its pid is known.
#[derive(Debug)]
pub struct Expected<'a>(&'a Reaper);

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        let mut table = self.0.table();
        table.expected -= 1;
        if table.expected == 0 {
            table.early.clear();
        }
    }
}

impl Reaper {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Call before a process is made; exits are remembered until this is dropped.
    pub fn expect(&self) -> Expected<'_> {
        self.table().expected += 1;
        Expected(self)
    }

    /// The end of a process, which may already have come.
    pub fn end_of(&self, _expected: &Expected<'_>, pid: Pid) -> oneshot::Receiver<Ended> {
        let (sender, receiver) = oneshot::channel();
        let mut table = self.table();
        match table.early.remove(&pid) {
            // The receiver is in our hands.
            Some(ended) => drop(sender.send(ended)),
            None => drop(table.waiting.insert(pid, sender)),
        }
        receiver
    }

    /// Reaps for ever.
    pub async fn run(&self) -> io::Result<()> {
        let mut signals = signal(SignalKind::child())?;
        loop {
            self.reap();
            if signals.recv().await.is_none() {
                return Ok(());
            }
        }
    }

    fn reap(&self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let signal = status.terminating_signal().unwrap_or(0);
            let code = status.exit_status().unwrap_or(128 + signal);
            let ended = Ended { code, signal: signal as u32, at: now() };
            let mut table = self.table();
            match table.waiting.remove(&pid) {
                // Nobody may care any more.
                Some(waiting) => drop(waiting.send(ended)),
                None if table.expected > 0 => drop(table.early.insert(pid, ended)),
                None => {}
            }
        }
    }
}

/// Unix nanoseconds.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}
