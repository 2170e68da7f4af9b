//! An exec whose bytes are on a lane of its pod's machine, and its window and its end in the call.

use crate::streaming::{next, show, window, words};
use a3s_box_api::agent::v1::{self as agent, exec_input, exec_output};
use a3s_box_lane::{
    Mark,
    frame::{Kind, Reader, Writer},
    lease::Lane,
};
use a3s_box_streaming::{BackendError, Input, Output, Streams, TerminalSize};
use a3s_box_sys::duplex::Duplex;
use bytes::Bytes;
use std::{convert::Infallible, io};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
};
use tonic::Streaming;

/// Carries both ways to the process's end; its exit code. When the lane breaks, the call has the reason.
pub(crate) async fn run(
    lane: Lane,
    mark: &Mark,
    streams: Streams,
    inputs: mpsc::Sender<agent::ExecInput>,
    call: Streaming<agent::ExecOutput>,
) -> Result<i32, BackendError> {
    let Streams { stdin, stdout, stderr, resizes, .. } = streams;
    let Lane { stream, lease: _lease, .. } = lane;
    let stream = Duplex::new(stream).map_err(|error| BackendError(error.to_string()))?;
    let (from, to) = tokio::io::split(stream);
    let shown = async {
        match show_all(from, mark, stdout, stderr).await {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Err(BackendError(format!("what the guest says of its output: {error}")))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    };
    let ended = async { tokio::try_join!(exit_code(call), shown).map(|(code, ())| code) };
    let typed = async {
        type_in(stdin, to, mark).await.ok();
        std::future::pending().await
    };
    // All in one task: a key is not handed on to another one, and the two halves need no lock.
    tokio::select! {
        biased;
        ended = ended => ended,
        never = typed => never,
        never = resize(resizes, inputs) => match never {},
    }
}

async fn show_all(
    from: impl AsyncRead + Unpin,
    mark: &Mark,
    mut stdout: Option<Output>,
    mut stderr: Option<Output>,
) -> io::Result<()> {
    let mut reader = Reader::begin(from, mark).await?;
    while let Some((kind, bytes)) = reader.next().await? {
        let bytes = Bytes::copy_from_slice(bytes);
        match kind {
            Kind::Main => show(&mut stdout, bytes).await,
            Kind::Stderr => show(&mut stderr, bytes).await,
            Kind::End => break,
        }
    }
    Ok(())
}

/// Comes back when there is no more to type, or nowhere to.
async fn type_in(
    mut stdin: Option<Input>,
    to: impl AsyncWrite + Unpin,
    mark: &Mark,
) -> io::Result<()> {
    let mut writer = Writer::begin(to, mark).await?;
    while let Some(bytes) = next(&mut stdin).await {
        writer.send(Kind::Main, &bytes).await?;
    }
    writer.end().await
}

async fn resize(
    mut sizes: mpsc::Receiver<TerminalSize>,
    inputs: mpsc::Sender<agent::ExecInput>,
) -> Infallible {
    while let Some(size) = sizes.recv().await {
        let kind = exec_input::Kind::Resize(window(size));
        // The call's end is its answers' to tell.
        inputs.send(agent::ExecInput { kind: Some(kind) }).await.ok();
    }
    // The call's input must not end before the call.
    std::future::pending().await
}

async fn exit_code(mut call: Streaming<agent::ExecOutput>) -> Result<i32, BackendError> {
    while let Some(output) = call.message().await.map_err(|status| words(&status))? {
        if let Some(exec_output::Kind::Exit(exit)) = output.kind {
            return Ok(exit.code);
        }
    }
    Err(BackendError("the command's end was not told".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARK: Mark = [3; 16];

    #[tokio::test]
    async fn what_is_typed_goes_in_order_and_its_end_is_told() {
        let (keys, stdin) = mpsc::channel(4);
        keys.send("a".into()).await.unwrap();
        keys.send("b".into()).await.unwrap();
        drop(keys);
        let mut lane = Vec::new();
        type_in(Some(stdin), &mut lane, &MARK).await.unwrap();
        let mut reader = Reader::begin(&lane[..], &MARK).await.unwrap();
        for expected in [(Kind::Main, &b"a"[..]), (Kind::Main, b"b"), (Kind::End, b"")] {
            assert_eq!(reader.next().await.unwrap().unwrap(), expected);
        }
        assert!(reader.next().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn what_is_shown_ends_with_the_guests_word_or_its_nonsense() {
        let mut lane = Vec::new();
        let mut writer = Writer::begin(&mut lane, &MARK).await.unwrap();
        writer.send(Kind::Stderr, b"to nobody").await.unwrap();
        writer.end().await.unwrap();
        lane.extend_from_slice(&[0xff; 4]);
        // A client that did not ask for an output does not see it; after the end nobody listens.
        show_all(&lane[..], &MARK, None, None).await.unwrap();
        let nonsense = [&MARK[..], &[0xff; 4]].concat();
        let error = show_all(&nonsense[..], &MARK, None, None).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
