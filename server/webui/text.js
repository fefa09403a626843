// What the page's code says, in the language that the server chose for the page.
const TEXTS = {
  zh: {
    again: "重新回答",
    brokenOff: "页面关掉时回答还没有完，点“继续”接着写。",
    continue: "继续",
    copied: "已复制",
    copy: "复制",
    edit: "修改问题",
    lost: "连接断开了，已有的文字还在。请看服务器的窗口是否还开着，再点“继续”或“重新回答”。",
    remove: "删除",
    removeAll: (title) => `删除对话“${title}”？`,
    stopped: "已停止。",
    storageFull: "浏览器的存储空间满了或者被关掉了，这段对话没有存下来：请删除一些旧对话。",
    thinking: "正在想……",
    unreachable: "连不上服务器。请看它的窗口是否还开着，再点“重新回答”。",
  },
  en: {
    again: "Answer again",
    brokenOff: "The page was closed before the answer was done; “Continue” goes on.",
    continue: "Continue",
    copied: "Copied",
    copy: "Copy",
    edit: "Edit question",
    lost: "The connection broke; the text so far is kept. See whether the server's window is still open, then press “Continue” or “Answer again”.",
    remove: "Delete",
    removeAll: (title) => `Delete the chat “${title}”?`,
    stopped: "Stopped.",
    storageFull: "The browser's storage is full or switched off and this chat was not kept: delete some old ones.",
    thinking: "Thinking …",
    unreachable: "The server cannot be reached. See whether its window is still open, then press “Answer again”.",
  },
};

export const text = TEXTS[document.documentElement.lang.startsWith("zh") ? "zh" : "en"];
