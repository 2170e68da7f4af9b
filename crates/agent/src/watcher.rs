//! Waits for files of cgroups to change (the kernel tells through inotify).

use rustix::{
    fd::OwnedFd,
    fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags},
    io::Errno,
};
use std::{
    collections::HashMap,
    io,
    mem::MaybeUninit,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Notify,
};

/// The watched files.
#[derive(Debug)]
pub struct Watcher {
    inotify: AsyncFd<OwnedFd>,
    watched: Arc<Mutex<HashMap<i32, Arc<Notify>>>>,
}

/// One watched file, until it is dropped.
#[derive(Debug)]
pub struct Watched {
    changed: Arc<Notify>,
    id: i32,
    watched: Arc<Mutex<HashMap<i32, Arc<Notify>>>>,
}

impl Watched {
    /// Returns after the file changed since the last call.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // The kernel's own watch goes with the file.
        self.watched.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

impl Watcher {
    /// Needs a runtime.
    pub fn new() -> io::Result<Self> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        Ok(Self {
            inotify: a3s_box_sys::watch::watch(fd, Interest::READABLE)?,
            watched: Arc::default(),
        })
    }

    /// Starts to watch a file.
    pub fn watch(&self, file: &Path) -> io::Result<Watched> {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        let id = inotify::add_watch(self.inotify.get_ref(), file, WatchFlags::MODIFY)?;
        let changed = Arc::clone(watched.entry(id).or_default());
        Ok(Watched { changed, id, watched: Arc::clone(&self.watched) })
    }

    /// Passes changes on, for ever.
    pub async fn run(&self) -> io::Result<()> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        loop {
            let mut ready = self.inotify.readable().await?;
            let mut reader = inotify::Reader::new(self.inotify.get_ref(), &mut buffer);
            loop {
                match reader.next() {
                    Ok(event) => {
                        let watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
                        if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
                            watched.values().for_each(|changed| changed.notify_one());
                        } else if let Some(changed) = watched.get(&event.wd()) {
                            changed.notify_one();
                        }
                    }
                    Err(Errno::AGAIN) => break,
                    Err(Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            ready.clear_ready();
        }
    }
}
