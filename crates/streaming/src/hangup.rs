//! Clients that go without a word.
//!
//! A session notices its client's end when it reads it. It does not read while what it has read is not
//! taken: a command that ignores its stdin would keep the session of a client that is long gone. The
//! kernel knows better, and is asked through a second descriptor of the connection.

use rustix::net::sockopt;
use std::{io, os::fd::AsFd, sync::Arc, time::Duration};
use tokio::{io::Interest, net::TcpStream, time::sleep};
use tokio_util::sync::CancellationToken;
use tracing::debug;

/// How long the rest of what a client has sent may take to be read, once it has gone.
const LAST_BYTES: Duration = Duration::from_secs(5);
/// How soon after one look at the connection there is another.
const BETWEEN_LOOKS: Duration = Duration::from_millis(500);
/// When a silent client is asked whether it is there, how often again, and how many times.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(30), Duration::from_secs(10), 3);

/// A connection's second descriptor.
#[derive(Debug, Clone)]
pub(crate) struct Hangup(Arc<TcpStream>);

/// Sets up a new connection: small messages go at once, and a host that fell silent is noticed.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<Hangup> {
    // Keystrokes must not wait for more of them.
    stream.set_nodelay(true)?;
    let (after, every, times) = KEEPALIVE;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, after)?;
    sockopt::set_tcp_keepintvl(stream, every)?;
    sockopt::set_tcp_keepcnt(stream, times)?;
    let second = std::net::TcpStream::from(stream.as_fd().try_clone_to_owned()?);
    Ok(Hangup(Arc::new(TcpStream::from_std(second)?)))
}

impl Hangup {
    /// Cancels `gone` a while after the client has closed its side; ends when it is cancelled.
    pub fn watch(self, gone: CancellationToken) {
        tokio::spawn(async move {
            tokio::select! {
                seen = self.wait() => match seen {
                    Ok(()) => sleep(LAST_BYTES).await,
                    Err(error) => return debug!(%error, "a connection cannot be watched"),
                },
                () = gone.cancelled() => {}
            }
            gone.cancel();
        });
    }

    async fn wait(&self) -> io::Result<()> {
        while !self.0.ready(Interest::READABLE).await?.is_read_closed() {
            // Bytes are the session's business: only what comes next is news.
            let later = || Err::<(), _>(io::ErrorKind::WouldBlock.into());
            self.0.try_io(Interest::READABLE, later).ok();
            // Nor are they worth a look each.
            sleep(BETWEEN_LOOKS).await;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{io::AsyncWriteExt, net::TcpListener};

    #[tokio::test]
    async fn a_hangup_is_seen_behind_unread_bytes() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let hangup = prepare(&stream).unwrap();
        let waiting = tokio::spawn(async move { hangup.wait().await });
        for _ in 0..3 {
            client.write_all(&[0; 1000]).await.unwrap();
            sleep(Duration::from_millis(20)).await;
        }
        assert!(!waiting.is_finished());
        drop(client);
        waiting.await.unwrap().unwrap();
        drop(stream);
    }
}
