//! A thread that waits in a system call, and may be called out of it.

use rustix::{process::Pid, thread::gettid};
use std::sync::{Mutex, Once, PoisonError};

/// Does nothing unless somebody asks for it, so a process that is about to be another program may have it, too.
const SIGNAL: libc::c_int = libc::SIGURG;

/// Where a thread is to be found while it works on something that may be given up.
#[derive(Debug, Default)]
pub struct Interrupt(Mutex<Option<Pid>>);

/// The calling thread is to be found, until this is dropped.
#[derive(Debug)]
pub struct Here<'a>(&'a Interrupt);

impl Interrupt {
    /// From now on [`Self::send`] interrupts the calling thread.
    pub fn here(&self) -> Here<'_> {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(handle);
        *self.thread() = Some(gettid());
        Here(self)
    }

    /// A call in which the thread waits comes back with EINTR; nothing else happens to it. A thread that was just
    /// about to wait does so: who needs it to stop sends again until it has.
    pub fn send(&self) {
        // Locked: the thread cannot end meanwhile, nor its number be another's.
        let thread = self.thread();
        if let Some(thread) = *thread {
            let process = rustix::process::getpid().as_raw_nonzero().get();
            // SAFETY: the call takes integers only.
            unsafe {
                libc::syscall(libc::SYS_tgkill, process, thread.as_raw_nonzero().get(), SIGNAL);
            }
        }
    }

    fn thread(&self) -> std::sync::MutexGuard<'_, Option<Pid>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Here<'_> {
    fn drop(&mut self) {
        *self.0.thread() = None;
    }
}

/// Without `SA_RESTART`: calls come back.
fn handle() {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: all of it is integers and sets of them, for which zeros are values.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as usize;
    // SAFETY: the action lives as long as the call, and its handler does nothing, which is safe at any time.
    unsafe { libc::sigaction(SIGNAL, &raw const action, std::ptr::null_mut()) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;
    use std::{
        sync::{Arc, mpsc},
        thread,
        time::Duration,
    };

    #[test]
    fn a_thread_is_called_out_of_a_read_and_not_after_it_left() {
        let (read, _write) = rustix::pipe::pipe().unwrap();
        let interrupt = Arc::new(Interrupt::default());
        // Nobody is there.
        interrupt.send();
        let (left, has_left) = mpsc::channel();
        let thread = thread::spawn({
            let interrupt = Arc::clone(&interrupt);
            move || {
                let here = interrupt.here();
                let came = rustix::io::read(&read, &mut [0; 1]);
                drop(here);
                left.send(()).unwrap();
                came
            }
        });
        while has_left.recv_timeout(Duration::from_millis(1)).is_err() {
            interrupt.send();
        }
        assert_eq!(thread.join().unwrap(), Err(Errno::INTR));
        assert!(interrupt.thread().is_none());
    }
}
