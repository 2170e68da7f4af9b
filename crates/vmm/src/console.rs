//! The guest's console: its last 64 KiB, for errors and for whoever debugs a pod.

use std::{
    collections::VecDeque,
    io,
    os::unix::net::UnixStream as StdStream,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::{io::AsyncReadExt, net::UnixStream};

/// Bytes kept.
pub const TAIL: usize = 64 * 1024;

/// A handle on what the guest printed; clones share it.
#[derive(Debug, Clone, Default)]
pub struct Console(Arc<Mutex<VecDeque<u8>>>);

impl Console {
    /// Reads `stream` until QEMU closes it, in a task of its own.
    ///
    /// # Errors
    /// When the runtime cannot wait for it.
    pub fn follow(stream: StdStream) -> io::Result<(Self, tokio::task::JoinHandle<()>)> {
        let console = Self::default();
        stream.set_nonblocking(true)?;
        let mut reader = UnixStream::from_std(stream)?;
        let kept = console.clone();
        let task = tokio::spawn(async move {
            let mut chunk = vec![0; 4096];
            while let Ok(length @ 1..) = reader.read(&mut chunk).await {
                kept.push(&chunk[..length]);
            }
        });
        Ok((console, task))
    }

    /// What is kept, as text.
    pub fn tail(&self) -> String {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&kept.iter().copied().collect::<Vec<_>>()).into_owned()
    }

    fn push(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(bytes);
        let surplus = kept.len().saturating_sub(TAIL);
        kept.drain(..surplus);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_64_kib_are_kept() {
        let console = Console::default();
        console.push(&vec![b'a'; TAIL]);
        console.push(b"the end");
        let tail = console.tail();
        assert_eq!(tail.len(), TAIL);
        assert!(tail.ends_with("aathe end"));
    }
}
