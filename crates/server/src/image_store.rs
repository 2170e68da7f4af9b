//! The `image` crate's store as the RPCs see it.

use crate::{
    config::Config,
    images::{Auth, Image, ImageRpcError, ImageStore, Usage},
};
use a3s_box_image::{ImageError, Images, Kind, Options};
use anyhow::Context;
use std::sync::Arc;
use tokio::task::spawn_blocking;
use tonic::Code;

/// The node's store.
pub fn open(config: &Config) -> anyhow::Result<Arc<dyn ImageStore>> {
    let folder = config.root.join("image");
    let options =
        Options { registry_config: config.image.registry_config.clone(), ..Options::default() };
    let images =
        Images::open(&folder, options).with_context(|| format!("open {}", folder.display()))?;
    Ok(Arc::new(NodeImages(Arc::new(images))))
}

struct NodeImages(Arc<Images>);

#[tonic::async_trait]
impl ImageStore for NodeImages {
    fn list(&self) -> Vec<Image> {
        self.0.list().into_iter().map(image).collect()
    }

    fn resolve(&self, name: &str) -> Option<Image> {
        self.0.resolve(name).map(image)
    }

    async fn pull(&self, reference: &str, auth: Option<Auth>) -> Result<Image, ImageRpcError> {
        let auth = auth.map(|auth| a3s_box_image::Auth {
            username: auth.username,
            password: auth.password,
            identity_token: auth.identity_token,
            registry_token: auth.registry_token,
            auth: auth.auth,
            server_address: auth.server_address,
        });
        let pulled = self.0.pull(reference, auth.as_ref()).await;
        pulled.map(image).map_err(|error| failed("pull image", error))
    }

    async fn remove(&self, name: &str) -> Result<(), ImageRpcError> {
        let (images, name) = (self.0.clone(), name.to_owned());
        in_thread("remove image", move || images.remove(&name)).await
    }

    fn fetched_bytes(&self) -> u64 {
        self.0.fetched_bytes()
    }

    async fn usage(&self) -> Result<Usage, ImageRpcError> {
        let images = self.0.clone();
        let usage = in_thread("measure images", move || images.usage()).await?;
        Ok(Usage { bytes: usage.bytes, inodes: usage.inodes })
    }
}

/// Runs what waits for the disk where it holds nobody up.
async fn in_thread<T: Send + 'static>(
    step: &'static str,
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageRpcError> {
    match spawn_blocking(work).await {
        Ok(done) => done.map_err(|error| failed(step, error)),
        Err(error) => Err(ImageRpcError::Store {
            step: step.to_owned(),
            code: Code::Internal,
            source: error.into(),
        }),
    }
}

fn image(image: a3s_box_image::Image) -> Image {
    Image {
        id: image.id,
        repo_tags: image.repo_tags,
        repo_digests: image.repo_digests,
        size: image.size,
        config: image.config,
        layers: image.layers,
        pinned: image.pinned,
    }
}

fn failed(step: &str, error: ImageError) -> ImageRpcError {
    let code = match error.kind() {
        Kind::NotFound => Code::NotFound,
        Kind::Unauthenticated => Code::Unauthenticated,
        Kind::PermissionDenied => Code::PermissionDenied,
        Kind::Unavailable => Code::Unavailable,
        Kind::DeadlineExceeded => Code::DeadlineExceeded,
        Kind::InvalidArgument => Code::InvalidArgument,
        Kind::FailedPrecondition => Code::FailedPrecondition,
        Kind::DataLoss => Code::DataLoss,
        Kind::ResourceExhausted => Code::ResourceExhausted,
        Kind::Cancelled => Code::Cancelled,
        Kind::Internal => Code::Internal,
    };
    ImageRpcError::Store { step: step.to_owned(), code, source: error.into() }
}
