//! The server's end of a shim's socket: one call each, errors with the step that failed.
//!
//! The socket's path derives from the sandbox id and the connection is made at the first call and
//! again after it broke, so a client can be had at any time, also before the shim runs.

use crate::sandbox::SandboxError;
use a3s_box_api::{
    agent::v1 as agent,
    shim::v1::{self as shim, shim_client},
};
use a3s_box_lane::lease::{self, Lane};
use a3s_box_sys::duplex::Duplex;
use a3s_box_types::shim::LANES_FILE;
use hyper_util::rt::TokioIo;
use std::{fs::File, io, os::fd::AsRawFd, path::Path, sync::Arc, time::Duration};
use tokio::net::UnixStream;
use tokio_stream::Stream;
use tonic::{
    Streaming,
    transport::{Channel, Endpoint},
};

/// Both outputs of ExecSync at their largest, and room for the rest.
const MESSAGE_MAX: usize = 48 << 20;

/// What the shim may send ahead on one call, and on all: a session whose client does not read must not
/// hold up the others.
const CALL_WINDOW: u32 = 256 << 10;
const CONNECTION_WINDOW: u32 = 64 << 20;

/// Longest that the shim needs for what it does without the guest.
const QUICK: Duration = Duration::from_secs(10);
/// Longest that a guest needs for one order, under the slowest accelerator and full load.
const GUEST: Duration = Duration::from_secs(120);

/// Cheap to clone: clones share the connection.
#[derive(Debug, Clone)]
pub struct ShimClient {
    client: shim_client::ShimClient<Channel>,
    socket: Arc<Path>,
}

impl ShimClient {
    /// A client of the socket, which need not be there yet. Call inside the runtime that is to carry its
    /// connection.
    pub fn new(socket: impl Into<Arc<Path>>) -> Self {
        let socket = socket.into();
        let path = socket.clone();
        let connect = tower::service_fn(move |_| {
            let socket = path.clone();
            async move { Duplex::new(dial(&socket).await?.into_std()?).map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://localhost")
            .initial_stream_window_size(CALL_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .connect_with_connector_lazy(connect);
        let client = shim_client::ShimClient::new(channel)
            .max_decoding_message_size(MESSAGE_MAX)
            .max_encoding_message_size(MESSAGE_MAX);
        Self { client, socket }
    }

    /// One with a connection of its own, carried by the caller's runtime.
    pub fn apart(&self) -> Self {
        Self::new(self.socket.clone())
    }

    /// Makes the boundary this sandbox.
    pub async fn configure(
        &self,
        sandbox: agent::ConfigureSandboxRequest,
    ) -> Result<shim::ConfigureSandboxResponse, SandboxError> {
        let request = shim::ConfigureSandboxRequest { sandbox: Some(sandbox) };
        let mut client = self.client.clone();
        call("configure the guest", GUEST, client.configure_sandbox(request)).await
    }

    /// The truth about the boundary and its containers.
    pub async fn state(&self) -> Result<shim::StateResponse, SandboxError> {
        let mut client = self.client.clone();
        call("ask the shim for its state", QUICK, client.state(shim::StateRequest {})).await
    }

    /// Makes the container, stopped before its exec.
    pub async fn create_container(
        &self,
        order: shim::CreateContainerRequest,
    ) -> Result<shim::ContainerState, SandboxError> {
        let mut client = self.client.clone();
        let answer = call("create the container", GUEST, client.create_container(order)).await?;
        Ok(answer.state.unwrap_or_default())
    }

    /// Lets it exec.
    pub async fn start_container(&self, id: &str) -> Result<shim::ContainerState, SandboxError> {
        let request = shim::StartContainerRequest { container_id: id.to_owned() };
        let mut client = self.client.clone();
        let answer = call("start the container", GUEST, client.start_container(request)).await?;
        Ok(answer.state.unwrap_or_default())
    }

    /// Sends a signal to init, or to every process of the container.
    pub async fn signal_container(
        &self,
        id: &str,
        signal: u32,
        whom: Whom,
    ) -> Result<(), SandboxError> {
        let all = whom == Whom::All;
        let request = shim::SignalContainerRequest { container_id: id.to_owned(), signal, all };
        let mut client = self.client.clone();
        call("signal the container", QUICK, client.signal_container(request)).await.map(drop)
    }

    /// Kills and removes what is left of it. OK when there is nothing.
    pub async fn remove_container(&self, id: &str) -> Result<(), SandboxError> {
        let request = shim::RemoveContainerRequest { container_id: id.to_owned() };
        let mut client = self.client.clone();
        call("remove the container", GUEST, client.remove_container(request)).await.map(drop)
    }

    /// Gives the boundary another size; what it has then.
    pub async fn resize(
        &self,
        order: shim::ResizeRequest,
    ) -> Result<shim::ResizeResponse, SandboxError> {
        let mut client = self.client.clone();
        call("resize the virtual machine", GUEST, client.resize(order)).await
    }

    /// Opens its log file anew.
    pub async fn reopen_log(&self, id: &str) -> Result<(), SandboxError> {
        let request = shim::ReopenLogRequest { container_id: id.to_owned() };
        let mut client = self.client.clone();
        call("reopen the container's log", QUICK, client.reopen_log(request)).await.map(drop)
    }

    /// Runs a command; without a limit it may take for ever.
    pub async fn exec_sync(
        &self,
        id: &str,
        args: Vec<String>,
        timeout: Option<Duration>,
    ) -> Result<shim::ExecSyncResponse, SandboxError> {
        let timeout_ms = timeout.map_or(0, |limit| limit.as_millis().max(1) as u64);
        let request = shim::ExecSyncRequest { container_id: id.to_owned(), args, timeout_ms };
        let mut client = self.client.clone();
        let run = client.exec_sync(request);
        // The shim keeps the time; this is for a shim that does not answer.
        let patience = timeout.map_or(Duration::MAX, |limit| limit.saturating_add(QUICK));
        call("run the command", patience, run).await
    }

    /// Puts other limits in force: OCI LinuxResources as JSON.
    pub async fn update_container(&self, id: &str, resources: Vec<u8>) -> Result<(), SandboxError> {
        let request = agent::UpdateContainerRequest {
            container_id: id.to_owned(),
            resources: resources.into(),
        };
        let mut client = self.client.clone();
        call("update the container", GUEST, client.update_container(request)).await.map(drop)
    }

    /// What these containers use, or all, and what the boundary takes on the host.
    pub async fn stats(
        &self,
        container_ids: Vec<String>,
        detail: Detail,
    ) -> Result<shim::StatsResponse, SandboxError> {
        let mut client = self.client.clone();
        let request = shim::StatsRequest { container_ids, detailed: detail == Detail::Full };
        call("ask for stats", QUICK, client.stats(request)).await
    }

    /// Runs a command with streams. Dropping the answers kills it.
    pub async fn exec(
        &self,
        inputs: impl Stream<Item = agent::ExecInput> + Send + 'static,
    ) -> Result<Streaming<agent::ExecOutput>, SandboxError> {
        let mut client = self.client.clone();
        call("run the command", GUEST, client.exec(inputs)).await
    }

    /// A lane of the machine; `None`: all are lent, there are none, or the shim is of a version without.
    pub async fn borrow_lane(&self) -> Option<Lane> {
        let socket = self.socket.with_file_name(LANES_FILE);
        lease::borrow(dial(&socket).await.ok()?).await.ok()?
    }

    /// A container's own streams, from now on.
    pub async fn attach(
        &self,
        inputs: impl Stream<Item = shim::AttachInput> + Send + 'static,
    ) -> Result<Streaming<agent::IoOutput>, SandboxError> {
        let mut client = self.client.clone();
        call("attach to the container", QUICK, client.attach(inputs)).await
    }

    /// A connection to a port of the pod.
    pub async fn port_forward(
        &self,
        inputs: impl Stream<Item = agent::PortInput> + Send + 'static,
    ) -> Result<Streaming<agent::PortOutput>, SandboxError> {
        let mut client = self.client.clone();
        call("connect to the port", GUEST, client.port_forward(inputs)).await
    }

    /// Exits and the boundary's end, from the beginning.
    pub async fn events(&self) -> Result<Streaming<shim::Event>, SandboxError> {
        let mut client = self.client.clone();
        call("watch the shim", QUICK, client.events(shim::EventsRequest {})).await
    }

    /// Ends the boundary and the shim.
    pub async fn shutdown(&self) -> Result<(), SandboxError> {
        let mut client = self.client.clone();
        let request = shim::ShutdownRequest {};
        call("shut the boundary down", QUICK, client.shutdown(request)).await.map(drop)
    }
}

/// Connects through the folder's descriptor: a path of any length fits.
async fn dial(socket: &Path) -> io::Result<UnixStream> {
    let (Some(folder), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    };
    let folder = File::open(folder)?;
    let short = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
    UnixStream::connect(short).await
}

/// How much stats tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detail {
    /// What CRI's stats have.
    Plain,
    /// What the metrics have besides, for which every process is looked at.
    Full,
}

/// Whom a signal goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whom {
    /// The container's first process.
    Init,
    /// Every process of the container.
    All,
}

async fn call<T>(
    step: &'static str,
    within: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, SandboxError> {
    match tokio::time::timeout(within, call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(SandboxError::Shim { step, status: Box::new(status) }),
        Err(_) => Err(SandboxError::Timeout { step, within }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_in_a_deep_folder_is_reached() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("x".repeat(200));
        std::fs::create_dir(&deep).unwrap();
        let directory = File::open(&deep).unwrap();
        let short = format!("/proc/self/fd/{}/s", directory.as_raw_fd());
        let _listener = tokio::net::UnixListener::bind(short).unwrap();
        dial(&deep.join("s")).await.unwrap();
    }
}
