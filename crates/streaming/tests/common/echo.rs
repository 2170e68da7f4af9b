//! A backend without processes: commands are words that it knows, ports give back what they get.

use a3s_box_streaming::{
    AttachRequest, Backend, BackendError, ExecRequest, Input, Output, Streams, TerminalSize,
};
use bytes::Bytes;
use futures::future::{BoxFuture, pending};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// This port refuses.
pub const REFUSING: u16 = 1;
/// This port takes nothing and says nothing, for ever.
pub const SILENT: u16 = 2;
const CHUNK: usize = 32 << 10;

/// See the module.
#[derive(Debug, Default)]
pub struct Echo {
    /// Sessions under way.
    pub running: Arc<AtomicUsize>,
}

struct Running(Arc<AtomicUsize>);

impl Running {
    fn begin(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Backend for Echo {
    fn exec(
        &self,
        request: ExecRequest,
        streams: Streams,
    ) -> BoxFuture<'_, Result<i32, BackendError>> {
        let running = Running::begin(&self.running);
        Box::pin(async move {
            let words: Vec<_> = request.command.iter().map(String::as_str).collect();
            let result = run(&words, streams, &self.running).await;
            drop(running);
            result
        })
    }

    fn attach(
        &self,
        _request: AttachRequest,
        streams: Streams,
    ) -> BoxFuture<'_, Result<(), BackendError>> {
        let running = Running::begin(&self.running);
        Box::pin(async move {
            cat(streams).await?;
            drop(running);
            Ok(())
        })
    }

    fn port_forward(
        &self,
        _sandbox_id: String,
        port: u16,
        mut input: Input,
        mut output: Output,
    ) -> BoxFuture<'_, Result<(), BackendError>> {
        let running = Running::begin(&self.running);
        Box::pin(async move {
            match port {
                REFUSING => return Err(BackendError("connection refused".to_owned())),
                SILENT => pending::<()>().await,
                _ => {
                    while let Some(bytes) = input.recv().await {
                        write(&mut output, bytes).await?;
                    }
                }
            }
            drop(running);
            Ok(())
        })
    }
}

async fn run(
    words: &[&str],
    mut streams: Streams,
    running: &AtomicUsize,
) -> Result<i32, BackendError> {
    match *words {
        ["cat"] => cat(streams).await.map(|()| 0),
        ["exit", code] => Ok(number(code)? as i32),
        ["fail"] => Err(BackendError("no such program".to_owned())),
        ["sleep"] => pending().await,
        ["running"] => {
            say(&mut streams.stdout, &running.load(Ordering::SeqCst).to_string()).await?;
            Ok(0)
        }
        ["both", count] => {
            for line in 0..number(count)? {
                say(&mut streams.stdout, &format!("out {line}\n")).await?;
                say(&mut streams.stderr, &format!("err {line}\n")).await?;
            }
            Ok(0)
        }
        ["sizes", count] => {
            for _ in 0..number(count)? {
                let Some(TerminalSize { width, height }) = streams.resizes.recv().await else {
                    break;
                };
                say(&mut streams.stdout, &format!("{width}x{height}\n")).await?;
            }
            Ok(0)
        }
        ["flood", count] => {
            let (count, mut sent) = (number(count)?, 0);
            while sent < count {
                let end = (sent + CHUNK).min(count);
                let chunk: Vec<u8> = (sent..end).map(pattern).collect();
                if let Some(stdout) = &mut streams.stdout {
                    write(stdout, chunk.into()).await?;
                }
                sent = end;
            }
            Ok(0)
        }
        ["digest"] => {
            let (mut count, mut hash) = (0, FNV_BASIS);
            while let Some(bytes) = next(&mut streams).await {
                count += bytes.len();
                hash = fnv(hash, &bytes);
            }
            say(&mut streams.stdout, &format!("{count} {hash:016x}")).await?;
            Ok(0)
        }
        _ => Err(BackendError(format!("{words:?} is no command"))),
    }
}

async fn next(streams: &mut Streams) -> Option<Bytes> {
    streams.stdin.as_mut()?.recv().await
}

async fn cat(mut streams: Streams) -> Result<(), BackendError> {
    while let Some(bytes) = next(&mut streams).await {
        if let Some(stdout) = &mut streams.stdout {
            write(stdout, bytes).await?;
        }
    }
    Ok(())
}

async fn say(output: &mut Option<Output>, text: &str) -> Result<(), BackendError> {
    match output {
        Some(output) => write(output, text.to_owned().into()).await,
        None => Ok(()),
    }
}

async fn write(output: &mut Output, bytes: Bytes) -> Result<(), BackendError> {
    output.write(bytes).await.map_err(|error| BackendError(error.to_string()))
}

fn number(text: &str) -> Result<usize, BackendError> {
    text.parse().map_err(|_| BackendError(format!("{text:?} is no number")))
}

/// What `flood` sends at this place.
pub fn pattern(place: usize) -> u8 {
    (place.wrapping_mul(31) ^ (place >> 8)) as u8
}

/// Where `fnv` begins.
pub const FNV_BASIS: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a.
pub fn fnv(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
