//! A child process of the shim whose end is waited for beside other things.

use a3s_box_sys::{pidfd, spawn::Spawn, watch::watch};
use std::{io, os::fd::OwnedFd, process::Child};
use tokio::io::{Interest, unix::AsyncFd};

/// A child and a descriptor that tells its end.
#[derive(Debug)]
pub struct WatchedChild {
    child: Child,
    process: AsyncFd<OwnedFd>,
}

impl WatchedChild {
    /// Starts it.
    pub fn start(spawn: Spawn) -> io::Result<Self> {
        let mut child = spawn.start()?;
        let process = pidfd::of_child(&child).and_then(|fd| watch(fd, Interest::READABLE));
        match process {
            Ok(process) => Ok(Self { child, process }),
            Err(err) => {
                child.kill()?;
                child.wait()?;
                Err(err)
            }
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for its end and says how it came; `name` is what it is. Cancel safe.
    pub async fn ended(&mut self, name: &str) -> String {
        if let Err(err) = self.process.readable().await {
            return format!("the {name} could not be watched: {err}");
        }
        match self.child.wait() {
            Ok(status) => format!("the {name} ended ({status}), see shim.log"),
            Err(err) => format!("the {name} could not be waited for: {err}"),
        }
    }
}
