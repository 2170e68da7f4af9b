//! Exec, Attach and PortForward: the URLs that the RPCs answer, and the way from a client's session to the
//! pod's shim.

use crate::{
    Server, exec_lane,
    exec_sync::running,
    node::Node,
    sandbox::{Sandbox, SandboxError},
    status::chain,
};
use a3s_box_api::{
    agent::v1::{self as agent, exec_input, exec_output, io_output},
    cri,
    shim::v1 as shim,
};
use a3s_box_lane::Mark;
use a3s_box_streaming::{
    AttachRequest, Backend, BackendError, ExecRequest, Input, Output, PortForwardRequest, Streams,
    TerminalSize,
};
use bytes::Bytes;
use futures::future::BoxFuture;
use std::sync::Arc;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// Messages on their way to the shim.
const WAITING: usize = 2;

/// The URL at which the command runs.
pub async fn exec(
    server: Arc<Server>,
    request: cri::ExecRequest,
) -> Result<cri::ExecResponse, SandboxError> {
    let request = exec_session(&server.node, request)?;
    let url = server.urls.exec(request).map_err(|error| SandboxError::busy(error.to_string()))?;
    Ok(cri::ExecResponse { url })
}

/// The URL at which the container's own streams are.
pub async fn attach(
    server: Arc<Server>,
    request: cri::AttachRequest,
) -> Result<cri::AttachResponse, SandboxError> {
    let request = attach_session(&server.node, &request)?;
    let url = server.urls.attach(request).map_err(|error| SandboxError::busy(error.to_string()))?;
    Ok(cri::AttachResponse { url })
}

/// The URL at which the pod's ports are.
pub async fn port_forward(
    server: Arc<Server>,
    request: cri::PortForwardRequest,
) -> Result<cri::PortForwardResponse, SandboxError> {
    let request = port_forward_session(&server.node, &request)?;
    let urls = &server.urls;
    let url = urls.port_forward(request).map_err(|error| SandboxError::busy(error.to_string()))?;
    Ok(cri::PortForwardResponse { url })
}

/// What is run for a client that comes to the URL.
pub(crate) fn exec_session(
    node: &Node,
    request: cri::ExecRequest,
) -> Result<ExecRequest, SandboxError> {
    if request.cmd.is_empty() {
        return Err(SandboxError::invalid("cmd", "is empty"));
    }
    check_streams(request.stdin, request.stdout, request.stderr, request.tty)?;
    let (_, container) = running(node, &request.container_id)?;
    Ok(ExecRequest {
        container_id: container.id.to_string(),
        command: request.cmd,
        tty: request.tty,
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
    })
}

/// What a client that comes to the URL is attached to.
pub(crate) fn attach_session(
    node: &Node,
    request: &cri::AttachRequest,
) -> Result<AttachRequest, SandboxError> {
    check_streams(request.stdin, request.stdout, request.stderr, request.tty)?;
    let (_, container) = running(node, &request.container_id)?;
    Ok(AttachRequest {
        container_id: container.id.to_string(),
        tty: container.spec.tty,
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
    })
}

/// What a client that comes to the URL may connect to.
pub(crate) fn port_forward_session(
    node: &Node,
    request: &cri::PortForwardRequest,
) -> Result<PortForwardRequest, SandboxError> {
    let sandbox = node.sandboxes.get(&request.pod_sandbox_id)?;
    ready(&sandbox)?;
    let port = |port: &i32| {
        let port = u16::try_from(*port).ok().filter(|port| *port > 0);
        port.ok_or_else(|| SandboxError::invalid("port", "is not between 1 and 65535"))
    };
    Ok(PortForwardRequest {
        sandbox_id: sandbox.view().record.id.to_string(),
        ports: request.port.iter().map(port).collect::<Result<_, _>>()?,
    })
}

fn check_streams(stdin: bool, stdout: bool, stderr: bool, tty: bool) -> Result<(), SandboxError> {
    if !(stdin || stdout || stderr) {
        return Err(SandboxError::invalid("stdin, stdout, stderr", "one of them must be set"));
    }
    if tty && stderr {
        return Err(SandboxError::invalid("stderr", "is not there on a terminal: unset it or tty"));
    }
    Ok(())
}

fn ready(sandbox: &Sandbox) -> Result<(), SandboxError> {
    let view = sandbox.view();
    if view.ready() {
        return Ok(());
    }
    Err(SandboxError::State {
        kind: "sandbox",
        id: view.record.id.to_string(),
        state: "not ready",
        needed: "ready",
    })
}

/// Sessions of this node's pods.
pub struct Pods(pub Arc<Node>);

impl Backend for Pods {
    fn exec(
        &self,
        request: ExecRequest,
        streams: Streams,
    ) -> BoxFuture<'_, Result<i32, BackendError>> {
        Box::pin(run_exec(&self.0, request, streams))
    }

    fn attach(
        &self,
        request: AttachRequest,
        streams: Streams,
    ) -> BoxFuture<'_, Result<(), BackendError>> {
        Box::pin(run_attach(&self.0, request, streams))
    }

    fn port_forward(
        &self,
        sandbox_id: String,
        port: u16,
        input: Input,
        output: Output,
    ) -> BoxFuture<'_, Result<(), BackendError>> {
        Box::pin(run_port_forward(&self.0, sandbox_id, port, input, output))
    }
}

async fn run_exec(
    node: &Node,
    request: ExecRequest,
    streams: Streams,
) -> Result<i32, BackendError> {
    let (sandbox, _) = running(node, &request.container_id).map_err(failed)?;
    let (sender, inputs) = mpsc::channel(WAITING);
    let shim = sandbox.shim().apart();
    let (lane, mark) = (shim.borrow_lane().await, rand::random::<Mark>());
    let start = agent::ExecStart {
        container_id: request.container_id,
        args: request.command,
        tty: request.tty,
        stdin: streams.stdin.is_some(),
        // A client that vanishes takes no process with it, as with other runtimes.
        outlives_call: true,
        lane: lane
            .as_ref()
            .map(|lane| agent::Lane { number: lane.number, mark: Bytes::copy_from_slice(&mark) }),
    };
    let message = |kind| agent::ExecInput { kind: Some(kind) };
    sender.try_send(message(exec_input::Kind::Start(start))).map_err(|error| gone(&error))?;
    let mut outputs = shim.exec(ReceiverStream::new(inputs)).await.map_err(failed)?;
    if let Some(lane) = lane {
        return exec_lane::run(lane, &mark, streams, sender, outputs).await;
    }
    let Streams { stdin, mut stdout, mut stderr, resizes, .. } = streams;
    let _feeding = feed(stdin, resizes, sender, move |fed| {
        message(match fed {
            Fed::Bytes(bytes) => exec_input::Kind::Stdin(bytes),
            Fed::End => exec_input::Kind::CloseStdin(true),
            Fed::Size(size) => exec_input::Kind::Resize(size),
        })
    });
    while let Some(output) = outputs.message().await.map_err(|status| words(&status))? {
        match output.kind {
            Some(exec_output::Kind::Stdout(bytes)) => show(&mut stdout, bytes).await,
            Some(exec_output::Kind::Stderr(bytes)) => show(&mut stderr, bytes).await,
            Some(exec_output::Kind::Exit(exit)) => return Ok(exit.code),
            Some(exec_output::Kind::Started(_)) | None => {}
        }
    }
    Err(BackendError("the command's end was not told".to_owned()))
}

async fn run_attach(
    node: &Node,
    request: AttachRequest,
    streams: Streams,
) -> Result<(), BackendError> {
    let (sandbox, container) = running(node, &request.container_id).map_err(failed)?;
    let (sender, inputs) = mpsc::channel(WAITING);
    // As with the peers: a stdin that only one client has keeps its session to the container's end.
    let spec = &container.spec;
    let ends_with_stdin =
        spec.stdin && (spec.tty || !spec.stdin_once) || !(request.stdout || request.stderr);
    let first = shim::AttachInput {
        container_id: request.container_id,
        has_stdin: request.stdin,
        ends_with_stdin,
        ..Default::default()
    };
    sender.try_send(first).map_err(|error| gone(&error))?;
    let mut outputs =
        sandbox.shim().apart().attach(ReceiverStream::new(inputs)).await.map_err(failed)?;
    let Streams { stdin, mut stdout, mut stderr, resizes, .. } = streams;
    let _feeding = feed(stdin, resizes, sender, |fed| match fed {
        Fed::Bytes(stdin) => shim::AttachInput { stdin, ..Default::default() },
        Fed::End => shim::AttachInput { close_stdin: true, ..Default::default() },
        Fed::Size(size) => shim::AttachInput { resize: Some(size), ..Default::default() },
    });
    while let Some(output) = outputs.message().await.map_err(|status| words(&status))? {
        match output.kind {
            Some(io_output::Kind::Stdout(bytes)) => show(&mut stdout, bytes).await,
            Some(io_output::Kind::Stderr(bytes)) => show(&mut stderr, bytes).await,
            None => {}
        }
    }
    Ok(())
}

async fn run_port_forward(
    node: &Node,
    sandbox_id: String,
    port: u16,
    input: Input,
    mut output: Output,
) -> Result<(), BackendError> {
    let sandbox = node.sandboxes.get(&sandbox_id).map_err(failed)?;
    let (sender, inputs) = mpsc::channel(WAITING);
    let first = agent::PortInput { port: port.into(), ..Default::default() };
    sender.try_send(first).map_err(|error| gone(&error))?;
    let mut outputs =
        sandbox.shim().apart().port_forward(ReceiverStream::new(inputs)).await.map_err(failed)?;
    let _feeding = feed(Some(input), mpsc::channel(1).1, sender, |fed| match fed {
        Fed::Bytes(data) => agent::PortInput { data, ..Default::default() },
        Fed::End | Fed::Size(_) => agent::PortInput { close: true, ..Default::default() },
    });
    while let Some(message) = outputs.message().await.map_err(|status| words(&status))? {
        if output.write(message.data).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// What a client sends.
enum Fed {
    Bytes(Bytes),
    End,
    Size(agent::WindowSize),
}

/// Carries a client's input to the shim until both of its parts have ended, or this is dropped.
struct Feeding(tokio::task::JoinHandle<()>);

impl Drop for Feeding {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn feed<T: Send + 'static>(
    mut stdin: Option<Input>,
    mut resizes: mpsc::Receiver<TerminalSize>,
    sender: mpsc::Sender<T>,
    wrap: impl Fn(Fed) -> T + Send + 'static,
) -> Feeding {
    Feeding(tokio::spawn(async move {
        let mut sizes = true;
        while stdin.is_some() || sizes {
            let fed = tokio::select! {
                bytes = next(&mut stdin) => match bytes {
                    Some(bytes) => Fed::Bytes(bytes),
                    None => {
                        stdin = None;
                        Fed::End
                    }
                },
                size = resizes.recv(), if sizes => match size {
                    Some(size) => Fed::Size(window(size)),
                    None => {
                        sizes = false;
                        continue;
                    }
                },
            };
            if sender.send(wrap(fed)).await.is_err() {
                return;
            }
        }
        // The call's input must not end before the call: that would close stdin.
        sender.closed().await;
    }))
}

/// The next piece of stdin; never, when there is none.
pub(crate) async fn next(stdin: &mut Option<Input>) -> Option<Bytes> {
    match stdin {
        Some(stdin) => stdin.recv().await,
        None => std::future::pending().await,
    }
}

pub(crate) fn window(size: TerminalSize) -> agent::WindowSize {
    let TerminalSize { width, height } = size;
    agent::WindowSize { width: width.into(), height: height.into() }
}

/// Shows bytes to the client; one that closed this stream does not see them, and the rest goes on.
pub(crate) async fn show(output: &mut Option<Output>, bytes: Bytes) {
    if let Some(stream) = output
        && stream.write(bytes).await.is_err()
    {
        *output = None;
    }
}

fn failed(error: SandboxError) -> BackendError {
    match error {
        // The step is the session's own; what the shim says is what the client wants to know.
        SandboxError::Shim { status, .. } => words(&status),
        error => BackendError(chain(&error)),
    }
}

pub(crate) fn words(status: &tonic::Status) -> BackendError {
    BackendError(status.message().to_owned())
}

fn gone(error: &dyn std::error::Error) -> BackendError {
    BackendError(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_has_a_stream_and_a_terminal_no_stderr() {
        assert!(check_streams(false, false, false, false).is_err());
        assert!(check_streams(true, true, true, true).is_err());
        assert!(check_streams(true, true, false, true).is_ok());
        assert!(check_streams(false, true, true, false).is_ok());
    }

    #[tokio::test]
    async fn input_is_carried_in_order_and_its_end_is_told_once() {
        let (stdin, input) = mpsc::channel(4);
        let (sender, mut fed) = mpsc::channel(4);
        let _feeding = feed(Some(input), mpsc::channel(1).1, sender, |fed| match fed {
            Fed::Bytes(bytes) => bytes,
            Fed::End => "END".into(),
            Fed::Size(_) => "SIZE".into(),
        });
        stdin.send("a".into()).await.unwrap();
        stdin.send("b".into()).await.unwrap();
        drop(stdin);
        for expected in ["a", "b", "END"] {
            assert_eq!(fed.recv().await.unwrap(), expected);
        }
        assert!(futures::poll!(Box::pin(fed.recv())).is_pending());
    }
}
