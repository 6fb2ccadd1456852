// The search runs in a worker, which browsers refuse to pages that are opened from disk. There an
// iframe stands in for it. The plugin `offline` of mkdocs.yml knows this file by its name.
if (location.protocol === "file:")
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      frame.srcdoc = `<script>
        postMessage = (data) => parent.postMessage(data, "*")
      </script><script src="${url}"></script>`
      this.loaded = new Promise((done) => frame.addEventListener("load", () => done(frame)))
      addEventListener("message", (event) => {
        if (event.source === frame.contentWindow)
          this.dispatchEvent(new MessageEvent("message", { data: event.data }))
      })
      document.body ? document.body.append(frame)
        : addEventListener("DOMContentLoaded", () => document.body.append(frame))
    }

    postMessage(data) {
      this.loaded.then((frame) =>
        frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
