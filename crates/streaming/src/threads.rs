//! The threads that sessions run on.
//!
//! All of a session is on one of them: what a client sends passes a handful of tasks on its way, and on a
//! runtime of many threads each of them could wake another thread, which costs more than the passing.

use futures::future::BoxFuture;
use std::{io, thread};
use tokio::{net::TcpStream, runtime, sync::mpsc};

/// Connections that wait for a thread that is busy.
const WAITING: usize = 64;

/// A connection on its way to its thread.
type Given = (std::net::TcpStream, Work);
/// What is done with it there.
pub(crate) type Work = Box<dyn FnOnce(TcpStream) -> BoxFuture<'static, ()> + Send>;

/// One runtime on each; they end, with their sessions, when this is dropped.
#[derive(Debug)]
pub(crate) struct Threads {
    queues: Vec<mpsc::Sender<Given>>,
    next: usize,
}

impl Threads {
    /// As many as there are processors.
    pub fn start() -> io::Result<Self> {
        let count = thread::available_parallelism().map_or(1, usize::from);
        Ok(Self { queues: (0..count).map(start_one).collect::<io::Result<_>>()?, next: 0 })
    }

    /// Gives a connection to the next thread.
    pub async fn give(&mut self, stream: TcpStream, work: Work) -> io::Result<()> {
        self.next = (self.next + 1) % self.queues.len();
        let given = self.queues[self.next].send((stream.into_std()?, work)).await;
        given.map_err(|_| io::Error::other("the thread has ended"))
    }
}

fn start_one(number: usize) -> io::Result<mpsc::Sender<Given>> {
    let (queue, connections) = mpsc::channel(WAITING);
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    let name = format!("streaming-{number}");
    thread::Builder::new().name(name).spawn(move || runtime.block_on(take(connections)))?;
    Ok(queue)
}

async fn take(mut connections: mpsc::Receiver<Given>) {
    while let Some((stream, work)) = connections.recv().await {
        match TcpStream::from_std(stream) {
            Ok(stream) => drop(tokio::spawn(work(stream))),
            Err(error) => tracing::debug!(%error, "a streaming connection cannot be set up"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    #[tokio::test]
    async fn a_connection_is_carried_on_one_of_the_threads_and_ends_with_them() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut threads = Threads::start().unwrap();
        let work: Work = Box::new(|mut stream| {
            Box::pin(async move {
                let carrier = thread::current().name().unwrap_or_default().to_owned();
                stream.write_all(carrier.as_bytes()).await.unwrap();
                std::future::pending().await
            })
        });
        threads.give(listener.accept().await.unwrap().0, work).await.unwrap();
        let mut carrier = [0; 10];
        client.read_exact(&mut carrier).await.unwrap();
        assert_eq!(&carrier, b"streaming-");
        drop(threads);
        client.read_to_end(&mut Vec::new()).await.unwrap();
    }
}
