//! ImageStatus.

use crate::{
    Server, image_list,
    images::{self, ImageRpcError},
};
use a3s_box_api::cri;
use std::{collections::HashMap, sync::Arc};

/// The image, or an answer without one when it was not pulled.
pub async fn image_status(
    server: Arc<Server>,
    request: cri::ImageStatusRequest,
) -> Result<cri::ImageStatusResponse, ImageRpcError> {
    let name = images::name_of(request.image.as_ref())?;
    let Some(image) = server.images.resolve(name) else {
        return Ok(cri::ImageStatusResponse::default());
    };
    let mut info = HashMap::new();
    if request.verbose {
        let layers: Vec<_> = image.layers.iter().map(|layer| layer.display().to_string()).collect();
        let text = serde_json::json!({ "imageSpec": image.config, "layers": layers });
        info.insert("info".to_owned(), text.to_string());
    }
    Ok(cri::ImageStatusResponse { image: Some(image_list::image(&image)), info })
}
