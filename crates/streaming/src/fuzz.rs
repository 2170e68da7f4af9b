//! Doors for fuzzers (feature `fuzz`): a client's bytes without a server.

use crate::{channels::Wanted, spdy, websocket};
use tokio::io::{AsyncWriteExt, DuplexStream, copy, duplex, sink, split};
use tokio_util::sync::CancellationToken;

/// What a process on a terminal reads of a client that says these bytes over WebSocket and goes.
/// `room`: how many of them are on the way at most.
pub async fn websocket(protocol: &str, said: &[u8], room: usize) -> Vec<u8> {
    let (near, far) = duplex(room);
    let wanted = Wanted { stdin: true, stdout: true, stderr: true, tty: true };
    let session = async {
        let (_client, streams) =
            websocket::accept(near, protocol, wanted, CancellationToken::new()).await;
        let (mut stdin, mut read) = (streams.stdin, Vec::new());
        while let Some(input) = &mut stdin
            && let Some(bytes) = input.recv().await
        {
            read.extend_from_slice(&bytes);
        }
        read
    };
    tokio::join!(session, say(far, said)).0
}

/// What all streams together bring of a client that says these bytes over SPDY and goes.
pub async fn spdy(said: &[u8], room: usize) -> Vec<(String, Vec<u8>)> {
    let (near, far) = duplex(room);
    let session = async {
        let mut session = spdy::Session::start(near, CancellationToken::new());
        let mut all = Vec::new();
        while let Some(mut stream) = session.accept().await {
            let name = stream.header("streamtype").unwrap_or_default().to_owned();
            let mut read = Vec::new();
            // One that nobody ends would hold up those behind it.
            while let Ok(bytes) = stream.input.try_recv() {
                read.extend_from_slice(&bytes);
            }
            if stream.writer.write(vec![7; 9].into()).await.is_ok() {
                stream.writer.close().await;
            }
            all.push((name, read));
        }
        all
    };
    tokio::join!(session, say(far, said)).0
}

async fn say(client: DuplexStream, said: &[u8]) {
    let (mut reads, mut writes) = split(client);
    let talk = async {
        // The session may end first.
        if writes.write_all(said).await.is_ok() {
            writes.shutdown().await.ok();
        }
    };
    let mut nowhere = sink();
    let (_, heard) = tokio::join!(talk, copy(&mut reads, &mut nowhere));
    heard.ok();
}
